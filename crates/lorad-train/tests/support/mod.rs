//! What the tests against the reference implementation share: where the golden files, the bundled base and the Python
//! oracle are.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

/// The repository.
pub(crate) fn repository() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
}

/// `tests/golden/<pipeline>`, made by `tools/reference/make_golden.py`.
pub(crate) fn golden(pipeline: &str) -> PathBuf {
    repository().join("tests/golden").join(pipeline)
}

/// The diffusers folder of a golden pipeline.
pub(crate) fn base_folder(pipeline: &str) -> PathBuf {
    match pipeline {
        "demo" => repository().join("assets/demo-icons"),
        tiny => golden(tiny).join("model"),
    }
}

/// A command of the Python that holds diffusers, transformers and PEFT.
///
/// # Panics
/// If it is not installed: these tests are the proof that results work elsewhere, so they are never skipped.
#[allow(dead_code)]
pub(crate) fn oracle_python() -> Command {
    let python = std::env::var_os("LORAD_ORACLE_PYTHON").map_or_else(
        || PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cache/lorad/oracle/bin/python"),
        PathBuf::from,
    );
    assert!(
        python.is_file(),
        "the Python oracle is missing ({}): run `cargo xtask oracle`",
        python.display()
    );
    let mut command = Command::new(python);
    command.env("PYTHONDONTWRITEBYTECODE", "1");
    command
}
