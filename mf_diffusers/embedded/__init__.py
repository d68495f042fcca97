"""The embedded model and the scenes of the demo, as files."""

from pathlib import Path


EMBEDDED_MODEL = Path(__file__).parent / "model"
EMBEDDED_SCENES = Path(__file__).parent / "scenes"
