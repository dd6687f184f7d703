"""Published METER checkpoints in and out."""

from meter_fast.interop.names import HEAD_NAMES, original_name, original_names
from meter_fast.interop.published import from_meter, to_meter, to_published
from meter_fast.interop.report import LoadReport

__all__ = ["HEAD_NAMES", "LoadReport", "from_meter", "original_name", "original_names", "to_meter", "to_published"]
