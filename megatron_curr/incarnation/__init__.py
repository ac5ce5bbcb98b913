"""Incarnations: every start of a run is one, and leaves a truthful record of how it ended.

No torch and no other part of the package is needed here, so that the job, its batch script, a login
node and the report read and write the same files with the same code::

    RUN/incarnations/0003/
        claim.json     rank 0, once, before anything else: who this is (``Claim``)
        pen/           stands as long as this incarnation may write (``fence``)
        nodes.json     rank 0, once, when all ranks have met: {node: [ranks]}
        surroundings.json  rank 0, once, likewise: cores, devices and variables of every rank
        beat.json      rank 0, every few seconds: how far it is, where time went (``Beat``)
        ended.7.json   rank 7's own word about its end, written before it goes (``Ending``)
        record.json    once, by whoever comes first: the verdict (``Record``)
    RUN/logs/0003/rank_7.log

``record.json`` is the one thing to decide from: exit codes lie. Rank 0 writes it where it can; else
``conclude(run_folder)``, called by the batch script when its launcher has returned, derives it from
what the ranks left. A successor concludes for its predecessors before it begins. The record says::

    {"incarnation": 3, "verdict": "continue", "cause": "signal:SIGUSR1",
     "detail": "stopped by SIGUSR1 at token 81920", "step": 160, "consumed_tokens": 81920,
     "resumed_step": 120, "resumed_tokens": 61440,     where it began
     "saved_step": 160, "saved_tokens": 81920,         its newest checkpoint, else where it began
     "lost_tokens": 512, "lost_s": 1.2,                steps of earlier incarnations, done again
     "bad_nodes": ["node7"], "suspect_ranks": [14, 15],
     "times_s": {"queue": .., "launch": .., ...},      see ``TIMES``
     "step_time_s": 0.31, "save_s": 4.1,               median step; longest save, start to published
     "began_at_s": .., "ended_at_s": ..,               Unix time
     "chain": "4711", "job_id": "4711", "restart": 0, "num_ranks": 16, "nodes": ["node0", ..]}

``verdict`` is one of four words. ``finished``: the schedule is at its end. ``continue``: start
again anywhere. ``continue_elsewhere``: start again without ``bad_nodes``. ``stop``: starting again
would not help, a person must look. ``cause`` is a short key that is the same when the same thing
happens again (``CAUSES``); ``detail`` is the sentence for a person. To start from an older
checkpoint, call ``training.checkpoint_folder.go_back`` between two incarnations.

The environment of the ranks says what only the batch script knows: ``MEGATRON_CURR_CHAIN`` (the
starts that belong together: the next one takes over from a stale one without asking; default: the
job's id), ``MEGATRON_CURR_SUBMITTED_S`` and ``MEGATRON_CURR_LAUNCHED_S`` (Unix time of the
submission, and just before ``srun``).
"""
