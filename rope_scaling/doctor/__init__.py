"""What is wrong with the scaling of a checkpoint or of a running model, in plain words, each with a code and a fix."""

from rope_scaling.doctor.diagnosis import Diagnosis, diagnose
from rope_scaling.doctor.findings import CODES, Finding


__all__ = ["CODES", "Diagnosis", "Finding", "diagnose"]
