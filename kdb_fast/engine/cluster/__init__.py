"""The process that talks to a Ray cluster, and what runs on the cluster's hosts::

    parent ──Embed: slot, lease, rows──► driver ──texts──► actor × CPUs of every host
       ▲                                   │               the worker's encoder, self-test and halving
       └──News: filled slots, hosts────────┘ ◄──vectors, codes, checksum──┘

:mod:`.driver` is what Ray knows as its driver: it has no arguments and no credentials, maps the slab, and is replaced
like a worker. In it :mod:`.fleet` decides which hosts and actors there are and :mod:`.blocks` which of them embeds
what, both without Ray; :mod:`.ray_cluster` alone calls it, through threads and callbacks that end in one queue of
events. A host is first asked what it has (:mod:`.survey`), then gets the model's files if it has not the same ones
(:mod:`.model_files`), then one actor for each CPU (:mod:`.actor`), with two blocks in flight.
"""
