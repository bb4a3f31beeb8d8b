//! Golden tensors: made by the reference implementation, committed under `tests/golden`, compared with in Rust tests.

use std::{path::Path, process::Command};

use anyhow::Result;

use crate::{exec, provision};

/// Runs the generator; with `check`, only compares what it would write with what is committed.
///
/// # Errors
/// If the oracle cannot be installed or the generator fails.
pub(crate) fn run(root: &Path, check: bool) -> Result<()> {
    let mut command = Command::new(provision::oracle(root)?);
    command.arg("tools/reference/make_golden.py");
    if check {
        command.arg("--check");
    }
    exec::must(&mut command)
}
