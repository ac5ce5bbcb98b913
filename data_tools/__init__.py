"""Commands that turn raw corpora into indexed shards; only the command line imports them."""
