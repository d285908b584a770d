"""`offramp serve`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from offramp.cli import options as o

if TYPE_CHECKING:
    from offramp import ExitPolicy
    from offramp.calibration.certificate import Certificate


def serve(
    model: o.Model,
    policy: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Policy saved as JSON, perhaps certified; default: full depth.")
    ] = None,
    exits: o.Exits = None,
    dtype: o.Dtype = "float32",
    engine: o.Engine = "auto",
    device: o.Device = None,
    name: Annotated[str | None, typer.Option(help="What clients call the model; default: MODEL.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: any that is free.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="OFFRAMP_API_KEY", help="Key that requests must bring; default: none.")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Answers at work at once.")] = 8,
    context: Annotated[
        int | None, typer.Option(min=2, help="Most tokens of prompt and answer; default: the model's, at most 2048.")
    ] = None,
    keep: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Tokens of earlier prompts and answers kept, so that prompts that begin alike are not computed anew; "
            "default: a quarter of ROWS times CONTEXT on the native engine, 0 on others, whose rounding it changes.",
        ),
    ] = None,
    max_waiting: Annotated[int, typer.Option(min=0, help="Answers that may wait for a row; more get status 429.")] = 64,
    max_body: Annotated[int, typer.Option(min=1, help="Most bytes of a request.")] = 2**20,
    timeout: Annotated[
        float, typer.Option(min=0.001, help="Seconds until an answer must be finished, waiting included.")
    ] = 600.0,
    grace: Annotated[float, typer.Option(min=0, help="Seconds that answers have to finish after SIGTERM.")] = 30.0,
    check: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Share of greedy answers made again at full depth, to see if the promise holds; default: 0.05 if "
            "there is a certificate.",
        ),
    ] = None,
    on_drift: Annotated[
        str, typer.Option(help="When the promise is found broken: say so, or go to full depth, too.")
    ] = "say",
) -> None:
    """Answer over HTTP as OpenAI's API does, requests joining and leaving a running batch.

    POST /v1/chat/completions and /v1/completions; GET /v1/models, /v1/offramp, /health, /metrics, and a page at /.
    """
    _require_extra()
    import offramp
    from offramp.calibration import load as load_certificate
    from offramp.serve.listen import bound, listen
    from offramp.serve.serving import Limits, Serving

    _require_one_of(on_drift)
    rule = None if policy is None else offramp.ExitPolicy.load(policy)
    certificate = None if policy is None else load_certificate(policy)
    share = (0.0 if certificate is None else 0.05) if check is None else check
    _require_used(rule, certificate, exits, share, to_full=on_drift == "full")
    with bound(host, port) as sock:  # before the model is read: a port that is taken is better known at once
        lm = offramp.load(model, dtype=dtype, device=device, exits=exits, engine=engine)
        most = lm.split.max_positions
        limits = Limits(
            rows=rows, longest=min(most or 2048, 2048) if context is None else context, kept=keep,
            waiting=max_waiting, body=max_body, timeout=timeout, key=api_key,
            local=host in ("127.0.0.1", "localhost", "::1"),
        )  # fmt: skip
        serving = Serving(
            lm, rule, certificate, name=name or model, limits=limits, check=share, to_full=on_drift == "full"
        )
        for line in serving.notes():
            o.note(line)
        where = f"[{host}]" if ":" in host else host
        o.note(f"serving {serving.name} on http://{where}:{sock.getsockname()[1]}")
        listen(serving, sock, grace=grace)


def _require_one_of(on_drift: str) -> None:
    if on_drift not in ("say", "full"):
        raise typer.BadParameter(f"--on-drift {on_drift}: choose say or full")


def _require_used(
    rule: ExitPolicy | None, certificate: Certificate | None, exits: str | None, share: float, *, to_full: bool
) -> None:
    """Refuse what would have no effect on answers at full depth, or where there is no promise that could be broken."""
    if rule is None and (exits is not None or share):
        name = "--check" if exits is None else "--exits"
        raise typer.BadParameter(f"{name}: only of a --policy; without one all answers are at full depth")
    if to_full and (certificate is None or not share):
        raise typer.BadParameter(
            "--on-drift full: only of a --policy with a certificate, whose promise --check may find broken; give both, "
            "or leave it out"
        )


def _require_extra() -> None:
    """What only a server needs."""
    from importlib import import_module

    for name in ("starlette", "sse_starlette", "uvicorn", "prometheus_client"):
        try:
            import_module(name)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"the server needs {name.replace('_', '-')}; install it with: pip install 'offramp[serve]'", name=name
            ) from error
