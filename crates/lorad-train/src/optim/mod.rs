//! AdamW with exportable state, clipping, schedules.
