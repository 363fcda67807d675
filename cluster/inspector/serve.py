"""Where the inspector runs: as an application of Ray Serve, or in this process."""

import contextlib
import http.client
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass

import ray
import uvicorn
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError

from cluster.config.project import UserError
from cluster.distributed.ray_cluster import connect_ray, namespace_of
from cluster.inspector.access import NO_TOKEN
from cluster.inspector.app import Target, build_app
from cluster.run.display import INSPECTOR_HOST as HOST
from cluster.run.display import INSPECTOR_PORT as DEFAULT_PORT
from cluster.run.display import inspector_address

_START_TIMEOUT_S = 300.0
# Serve kills a proxy that takes longer to start; its own 5 s are too few for a busy machine. It is
# read on clusters that are started here.
_PROXY_PATIENCE = ("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
_ROUTE_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 10.0
_SILENCE_TIMEOUT_S = 60.0
_REPLY_TIMEOUT_S = 10.0
_POLL_S = 0.2


class InspectorGone(ConnectionError):
    """The inspector does not answer any more."""


def prefix(run: str) -> str:
    """The first part of every address of the inspector of a run."""
    return f"/inspect/{run}"


@dataclass(frozen=True, slots=True)
class Place:
    """Where the inspector of a run can be seen."""

    run: str
    port: int
    dashboard: str | None = None  # the page of Ray's that lists it

    @property
    def url(self) -> str:
        return inspector_address(self.run, self.port)

    def watch(self) -> None:
        """Raise InspectorGone when nothing answers there for _SILENCE_TIMEOUT_S."""
        if not answers(self, within_s=_SILENCE_TIMEOUT_S):
            raise InspectorGone(
                f"nothing answers at {HOST}:{self.port} any more, for {_SILENCE_TIMEOUT_S:.0f} s:"
                f" the Ray cluster has ended, perhaps with its run."
                f" 'amortize inspect --run {self.run}' shows what that has left"
            )


@contextmanager
def served_by_ray(target: Target, *, port: int | None, address: str | None) -> Iterator[Place]:
    """Run on the Ray cluster at `address`, or on one started here; raises UserError.

    The application runs on this machine, which has the run's folder. It leaves the cluster as it
    was, but for Serve and its HTTP proxy on `port`, which others may use by then.
    """
    port = port or DEFAULT_PORT
    os.environ.setdefault(*_PROXY_PATIENCE)
    try:
        connect_ray(target.config, address, namespace_of(target.run))
    except Exception as error:  # Ray has no class of its own for what can go wrong here
        what = f"join the Ray cluster at {address}" if address else "start Ray on this machine"
        raise UserError(f"cannot {what}: {error}. --no-serve shows the run without Ray") from error
    name = f"inspector-{target.run}"
    try:
        _deploy(target, name, port)
        _wait_until_running(name)
        # Asked again, Ray says where this process is; it joins nothing a second time.
        dashboard = ray.init(ignore_reinit_error=True).dashboard_url
        place = Place(target.run, port, f"http://{dashboard}/#/serve" if dashboard else None)
        if not answers(place, within_s=_ROUTE_TIMEOUT_S):
            raise UserError(
                f"the inspector does not answer at {place.url}. Another program may have the port;"
                f" or Ray Serve was started before on this cluster, and listens where it did then:"
                f" name another port, or that one, with --port"
            )
        yield place
    except InspectorGone:
        # A cluster that is gone answers no requests, and may take long to say so.
        raise
    except RayError as error:
        raise UserError(f"the Ray cluster gave up on {name}: {error}") from error
    except BaseException:
        _leave(name)
        raise
    else:
        _leave(name)


def _deploy(target: Target, name: str, port: int) -> None:
    """Start the Serve application; waits for nothing."""
    # Access logs would be one line for each refresh of each open page.
    quiet = {"enable_access_log": False, "log_level": "WARNING"}
    for name_of_log in ("ray", "ray.serve"):
        logging.getLogger(name_of_log).setLevel(logging.WARNING)
    serve.start(http_options={"host": HOST, "port": port}, logging_config=quiet)
    # The run's folder and its Redis are here: so is the replica.
    here = {f"node:{ray.util.get_node_ip_address()}": 0.001}
    deployment = serve.deployment(serve.ingress(lambda: build_app(target))()).options(
        name="Inspector", num_replicas=1, ray_actor_options={"num_cpus": 0, "resources": here}
    )
    application = serve.RunTarget(
        target=deployment.bind(),
        name=name,
        route_prefix=prefix(target.run),
        logging_config=quiet,
    )
    serve.run_many(
        [application],
        wait_for_ingress_deployment_creation=False,
        wait_for_applications_running=False,
    )


def _wait_until_running(name: str) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    status = None
    while status != "RUNNING":
        application = serve.status().applications.get(name)
        status = None if application is None else application.status
        if application is not None and status in ("DEPLOY_FAILED", "UNHEALTHY"):
            raise UserError(f"Ray Serve could not start {name}: {application.message}")
        if time.monotonic() > deadline:
            raise UserError(
                f"Ray Serve did not start {name} within {_START_TIMEOUT_S:.0f} s; "
                f"its state: {application}"
            )
        time.sleep(_POLL_S)


def _leave(application: str) -> None:
    """Take the application off the cluster, and this process too."""
    if ray.is_initialized():
        serve.delete(application)
        ray.shutdown()


def answers(place: Place, *, within_s: float) -> bool:
    """Whether the inspector asks for its token at its place; waits for it.

    Another program on the same port must not pass for it, and be told the token.
    """
    deadline = time.monotonic() + within_s
    while True:
        connection = http.client.HTTPConnection(HOST, place.port, timeout=_REPLY_TIMEOUT_S)
        with contextlib.suppress(OSError, http.client.HTTPException), closing(connection):
            connection.request("GET", f"{prefix(place.run)}/")
            if connection.getresponse().read().decode(errors="replace") == NO_TOKEN:
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)


@contextmanager
def served_here(target: Target, *, port: int | None) -> Iterator[Place]:
    """Run in this process, without Ray, on DEFAULT_PORT, any free one, or `port` alone if given.

    Raises UserError.
    """
    outer = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    outer.mount(prefix(target.run), build_app(target))
    with _listening(port) as listener:
        settings = uvicorn.Config(outer, access_log=False, log_level="warning", lifespan="off")
        server = uvicorn.Server(settings)
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        try:
            place = Place(target.run, listener.getsockname()[1])
            if not answers(place, within_s=_ROUTE_TIMEOUT_S):
                raise UserError(f"the web server at {place.url} did not come up")
            yield place
        finally:
            server.should_exit = True
            thread.join(_STOP_TIMEOUT_S)


def _listening(port: int | None) -> socket.socket:
    for wanted in (DEFAULT_PORT, 0) if port is None else (port,):
        with contextlib.suppress(OSError):
            return socket.create_server((HOST, wanted))
    raise UserError(f"port {port} of {HOST} is in use by another program: name another with --port")
