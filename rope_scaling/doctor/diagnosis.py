"""`diagnose`: all the checks, on a folder, a hub id or a running model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from rope_scaling.doctor.checkpoint_files import check_files
from rope_scaling.doctor.findings import NOTE, Finding, found
from rope_scaling.doctor.live_model import check_live_model
from rope_scaling.doctor.rope_config import check_settings
from rope_scaling.doctor.servers import check_servers
from rope_scaling.doctor.sources import Source, read_source, source_of
from rope_scaling.errors import RopeScalingError, cause_of, check_length, unknown_name
from rope_scaling.exporters.targets import TARGETS
from rope_scaling.hf.checkpoint import Checkpoint, read_checkpoint
from rope_scaling.hf.configs import RECORD_KEY
from rope_scaling.hf.describe import Description, description_of
from rope_scaling.hf.model_patch import Patch, applied_patch
from rope_scaling.hf.patch import patch
from rope_scaling.hf.skeleton import build_skeleton


_TRAINED = "original_max_position_embeddings"


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found."""

    name: str
    description: Description | None
    """What is in effect; `None` where it cannot be computed, and for an adapter alone."""
    findings: tuple[Finding, ...]

    @property
    def healthy(self) -> bool:
        """Whether there is nothing but notes."""
        return all(finding.level == NOTE for finding in self.findings)

    def __str__(self) -> str:
        parts = [str(self.description or self.name), *map(str, self.findings)]
        return "\n\n".join(parts if self.findings else [*parts, "Nothing found."])


def diagnose(
    model: str | nn.Module,
    target_length: int | None = None,
    targets: str | Sequence[str] = (),
    original_max_position_embeddings: int | None = None,
) -> Diagnosis:
    """Looks for what makes scaling wrong in silence: in the files of a checkpoint, or in a running model.

    Args:
        model (`str` or `nn.Module`): A folder, a hub id, `demo`, the folder of an adapter; its weights are not loaded.
            Or a loaded model, patched or not.
        target_length (`int`, *optional*): Length in tokens that it is to read; by default what its config states.
        targets (`str` or list of `str`, *optional*): What it is to be served with, as for `export`; what others than
            these read differently is only noted.
        original_max_position_embeddings (`int`, *optional*): Trained length in tokens of a checkpoint whose config has
            none or a wrong one.

    Returns:
        `Diagnosis`: the scaling in effect, and the findings.

    Raises:
        RopeScalingError: there is nothing to read, a running model has no RoPE, or a trained length is given for a
            running or patched model.
    """
    targets = [targets] if isinstance(targets, str) else list(targets)
    for target in targets:
        if target not in TARGETS:
            raise unknown_name("target", target, TARGETS)
    if target_length is not None:
        target_length = check_length("target_length", target_length)
    if isinstance(model, str):
        source = read_source(model)
        if original_max_position_embeddings is not None:
            source = source.trained_at(check_length(_TRAINED, original_max_position_embeddings))
        checkpoint = None
    elif original_max_position_embeddings is not None:
        raise RopeScalingError(f"`{_TRAINED}` is for a folder or hub id. Patch a loaded model with it.")
    else:
        checkpoint = read_checkpoint(model)
        source = source_of(model, checkpoint.config)
    findings = [] if not source.text else [*check_settings(source, target_length)]
    findings += check_files(source, target_length)
    if checkpoint is not None:
        findings += check_live_model(checkpoint, applied_patch(checkpoint.slots))
    elif source.config is not None:
        checkpoint, problem = _skeleton(source, findings)
        findings += problem
    description = None
    if checkpoint is not None:
        applied = applied_patch(checkpoint.slots)
        description = _describe(checkpoint, applied)
        if description is not None:
            findings += check_servers(source, checkpoint, applied, targets)
    return Diagnosis(source.name, description, tuple(findings))


def _skeleton(source: Source, findings: list[Finding]) -> tuple[Checkpoint | None, list[Finding]]:
    """The model without weights, under the patch that it records; or what keeps it from being built."""
    if any(finding.level == "error" for finding in findings):
        return None, []
    try:
        model = build_skeleton(source.name, source.whole)
    # No model for it, or a library that it needs: the config may well be right.
    except (RopeScalingError, ImportError):
        return None, []
    except Exception as error:  # a config that reads may still build no model, in any way
        if (cause := cause_of(error)).kind in ("memory", "network"):  # the config may well be right
            raise RopeScalingError(f"Cannot build {source.name!r}: {cause}") from error
        return None, [found("RS114", f"No model can be created from the config: {error}", "Fix `config.json`.")]
    if RECORD_KEY in source.text:
        try:
            patch(model)
        except RopeScalingError as error:
            return None, [
                found("RS203", str(error), "Patch the base model again, or take the folder as it was saved.")
            ]
    try:
        return read_checkpoint(model), []
    except RopeScalingError:  # no RoPE
        return None, []


def _describe(checkpoint: Checkpoint, patch: Patch | None) -> Description | None:
    try:
        return description_of(checkpoint, patch)
    except RopeScalingError:
        return None
