"""Slurm: from a recipe and a profile to a run that goes on until it is finished.

On the login node ``submit`` reads a ``profile``, checks it against the cluster, freezes code and
recipe (``freeze``) into the run folder, renders ``slurm/train.sbatch`` (``script``) and submits it;
``status`` looks at a run; ``array`` submits many small pieces of work. Inside the job the batch
script asks ``job`` before every start of the ranks what to do; ``policy`` answers from the
incarnation records alone. ``client`` is the only module that calls Slurm's commands.

``client``, ``policy`` and ``job`` run on the batch node outside any container: they need Python
3.11 and nothing else. What a submission leaves::

    RUN/slurm/0001/           submission.json, recipe.yaml, profile.yaml, train.sbatch, code.diff
    RUN/slurm/code/4f0a.../   the package as it was, one folder for each state of the code
    RUN/slurm/events.jsonl    one line for each job, start, exclusion and end of a chain
    RUN/logs/slurm-4711.out   output of a job; of the ranks: RUN/logs/0003/rank_7.log
"""
