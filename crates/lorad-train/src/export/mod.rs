//! Result files: diffusers, kohya, PEFT, merged pipeline, receipt.
