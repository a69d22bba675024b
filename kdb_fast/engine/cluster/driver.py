"""PROCESS ×1: the driver of a Ray cluster, between the parent's slab and the cluster's hosts.

It stands between them for two reasons. Ray keeps the command line of its driver, and some of its environment, where all
users of the cluster can read them: this process has neither arguments nor credentials. And if Ray ends its driver, or
hangs, the parent replaces it as any child, and the blocks that were not answered are given out again.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from multiprocessing.connection import Connection, wait
from typing import Any

from ...embedding.encoder import EncoderSpec
from ...ipc.child import enter_child, saying
from ...ipc.messages import Embed, Failed, Ready, Stop
from ...ipc.slab import Slab
from . import ray_cluster
from .fleet import Fleet
from .messages import ClusterSpec, News

VARIABLES = ("RAY_ADDRESS", "RAY_TMPDIR", "RAY_USE_TLS", "RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT",
             "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH",
             "RAY_CLIENT_RECONNECT_GRACE_PERIOD", "RAY_gcs_rpc_server_reconnect_timeout_s")  # fmt: skip
"""What this process sees of the environment beside what a worker sees: where the cluster is, how to enter it, and how
long Ray waits for its head."""

CONNECT_SECONDS = 300.0
"""Whoever has not reached the cluster by then hangs: four attempts of Ray's client that fail after a minute each."""

SURVEY_SECONDS = 40.0
"""Hosts that have not said by then what they have may join later."""

BEAT_SECONDS = 1.0
"""How often the parent is told that this process is alive, and the fleet looked after."""

SHUTDOWN_SECONDS = 3.0
"""Ray's own end. Without it the actors end as well, once Ray notices that this process has gone."""

NEWS_SLOTS = 100
"""Filled slots in one message, so that it fits the pipe."""


def run(connection: Connection, spec: ClusterSpec, encoder: EncoderSpec, stderr: Any) -> None:
    """Entry point of the process.

    Args:
        connection: This process's own pipe to the parent.
        spec: The cluster.
        encoder: The model and how to run it, with the files as they are on this machine.
        stderr: A descriptor holder for what libraries print.
    """
    started = time.monotonic()
    enter_child(stderr)
    # Ray prints what it thinks of, also without its logs; the command's output is no place for that.
    os.dup2(2, 1)
    # What spawn hands on of the parent's; Ray or a library might show it.
    sys.argv = ["kdb-fast"]
    try:
        connection.send(Ready(time.monotonic() - started))
        with saying(BEAT_SECONDS, lambda: connection.send(News()), at_most=CONNECT_SECONDS):
            ray = ray_cluster.connect(spec)
        cluster = ray_cluster.RayCluster(ray, encoder, spec.name)
        fleet = Fleet(cluster, spec, encoder.model.memory_bytes)
        _survey(connection, cluster, fleet, spec.patience)
        connection.send(fleet.survey())
        slab = Slab.receive(connection)
        fleet.begin(slab)
        serve(connection, cluster, fleet)
        _shut_down(ray)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        os._exit(0)
    except BaseException as error:
        with contextlib.suppress(OSError):
            connection.send(Failed.of(error))
        os._exit(1)
    os._exit(0)


def _survey(connection: Connection, cluster: ray_cluster.RayCluster, fleet: Fleet, patience: float) -> None:
    """Until all hosts have said what they have. Where none can embed, one may still join."""
    started = time.monotonic()
    while (seconds := time.monotonic() - started) < max(SURVEY_SECONDS, patience):
        if fleet.can_embed and (fleet.examined or seconds > SURVEY_SECONDS):
            return
        if fleet.examined and seconds > patience:
            return
        wait([cluster.wake_end], BEAT_SECONDS)
        fleet.happened(cluster.events())
        connection.send(News())


def serve(connection: Connection, cluster: ray_cluster.RayCluster, fleet: Fleet) -> None:
    """Carry orders to the fleet and news to the parent until Stop.

    Raises:
        ConnectionError: The head is gone for good; a successor of this process may find another.
    """
    taken, said = 0, 0.0
    while True:
        ready = wait([connection, cluster.wake_end], BEAT_SECONDS)
        if connection in ready:
            while connection.poll():
                message = connection.recv()
                if isinstance(message, Stop):
                    return
                assert isinstance(message, Embed)
                fleet.embed(message)
                taken += 1
        fleet.happened(cluster.events())
        fleet.turn()
        news = fleet.news()
        now = time.monotonic()
        if any(news) or now - said >= BEAT_SECONDS:
            if not cluster.connected:
                raise ConnectionError("the head of the cluster is gone")
            said = now
            for at in range(0, max(1, len(news.filled)), NEWS_SLOTS):
                connection.send(news._replace(taken=taken, filled=news.filled[at : at + NEWS_SLOTS]))
                news = News(filled=news.filled)


def _shut_down(ray: Any) -> None:
    thread = threading.Thread(target=ray.shutdown, daemon=True)
    thread.start()
    thread.join(SHUTDOWN_SECONDS)
