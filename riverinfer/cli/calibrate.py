"""``riverinfer calibrate``: the loosest tau whose disagreement with exact mode is certified, for ``--tau auto``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from riverinfer.cli.setup import load_engine
from riverinfer.errors import InvalidRequestError
from riverinfer.progress import ConsoleProgress

if TYPE_CHECKING:
    from riverinfer.evidence.certificate import Certificate


def run(args: argparse.Namespace) -> int:
    """Calibrate, write the certificate, print what was tested and what follows. That nothing follows is no error.

    A certificate that is there is replaced at the end, at once and whole.
    """
    from riverinfer.evidence.prompts import read_prompts

    prompts = read_prompts(args.prompts)
    _check(args)
    delta = round(1 - args.confidence, 12)
    with load_engine(args) as engine:
        from riverinfer.checkpoint import Checkpoint
        from riverinfer.evidence.certificate import certificate_path, store_certificate
        from riverinfer.evidence.tau_calibration import calibrate_tau
        from riverinfer.weights_convert.river_artifact import river_path

        assert engine.river_settings is not None  # in river mode
        path = certificate_path(river_path(Checkpoint.open(engine.model_dir), engine.river_settings))
        _require_writable(path.parent)
        _warn_of_few(len(set(prompts)), args.max_disagreement, delta)
        certificate = calibrate_tau(
            engine,
            prompts,
            epsilon=args.max_disagreement,
            delta=delta,
            horizon=args.horizon,
            progress=ConsoleProgress(quiet_s=1.0),
        )
        layers = engine.config.num_layers
    store_certificate(certificate, path)
    if args.json:
        print(json.dumps({**certificate.as_dict(), "path": str(path)}))
    else:
        print(_table(certificate, layers))
        print(_conclusion(certificate, layers))
        print(f"certificate: {path}")
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuse bad values before a model is loaded, under the names of their flags."""
    from riverinfer.evidence.tau_calibration import check_share
    from riverinfer.sampling import check_integer

    check_share("--max-disagreement", args.max_disagreement)
    check_share("--confidence", args.confidence)
    check_integer("--horizon", args.horizon, 1)


def _require_writable(folder: Path) -> None:
    if not os.access(folder, os.W_OK):
        raise InvalidRequestError(
            "cannot be written to", file=folder, remedy="choose another folder with RIVERINFER_CACHE"
        )


def _warn_of_few(prompts: int, epsilon: float, delta: float) -> None:
    from riverinfer.evidence.learn_then_test import fewest_prompts

    fewest = fewest_prompts(epsilon, delta)
    if prompts < fewest:
        few = "1 prompt cannot" if prompts == 1 else f"{prompts} different prompts cannot"
        shown = f"whatever {'it shows' if prompts == 1 else 'they show'}, it takes {fewest} at least"
        print(f"riverinfer: note: {few} certify {epsilon:g} {shown}", file=sys.stderr)


def _table(certificate: Certificate, layers: int) -> str:
    """A line for each tested setting, and one for those that were not reached."""
    lines = [f"{'tau':>6}  {'mean depth':>12}  {'mean loss':>9}  {'p-value':>8}  verdict"]
    for each in certificate.tested:
        verdict = "certified" if each.p_value <= certificate.delta else "not certified"
        depth = f"{each.mean_depth:.1f} of {layers}"
        lines.append(f"{each.tau:>6g}  {depth:>12}  {each.mean_loss:>9.4f}  {each.p_value:>8.2g}  {verdict}")
    left = certificate.grid[len(certificate.tested) :]
    if left:
        lines.append(f"{left[0]:>6g}  and looser: not tested, since one before was not certified")
    return "\n".join(lines)


def _conclusion(certificate: Certificate, layers: int) -> str:
    from riverinfer.evidence.learn_then_test import least_bound

    bound, sure = f"{certificate.epsilon:.2%}", f"{1 - certificate.delta:.4g}"
    if certificate.tau is None:
        least = least_bound(certificate.prompts, certificate.delta)
        one = certificate.prompts == 1
        return (
            f"Nothing could be certified: {'1 prompt does' if one else f'{certificate.prompts} prompts do'} not show,"
            f" with confidence {sure}, a mean disagreement below {bound} even at the strictest tau"
            f" ({certificate.tested[0].mean_loss:.2%} was seen; {'it' if one else 'so many prompts'} could show"
            f" {least:.2%} at best). --tau auto runs exact mode."
        )
    deployed = next(each for each in certificate.tested if each.tau == certificate.tau)
    like = "this one" if certificate.prompts == 1 else f"these {certificate.prompts}"
    judged = f"{certificate.horizon} token{'' if certificate.horizon == 1 else 's'}"
    text = (
        f"Certified: tau {certificate.tau:g}. With confidence {sure}, on average over prompts like {like}, the river's"
        f" likeliest token is another than exact mode's at less than {bound} of an answer's first {judged}, after the"
        f" one that the exact prompt predicts ({deployed.mean_loss:.2%} was seen)."
    )
    if deployed.mean_depth > layers - 0.5:
        text += " But hardly a token left the backbone: this is no faster than exact mode."
    return text
