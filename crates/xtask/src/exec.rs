//! Running other programs: echoes what is run, streams its output and keeps a copy for [`crate::report`] to count.

use std::{
    ffi::OsStr,
    io::{BufRead, BufReader, Read, Write},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail};

/// The repository: two levels above this crate.
pub(crate) fn repository_root() -> Result<PathBuf> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let root = here
        .ancestors()
        .nth(2)
        .context("the xtask crate lies at crates/xtask")?;
    Ok(root.to_owned())
}

/// Where cargo puts its output for this repository.
pub(crate) fn target_dir(root: &Path) -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), |dir| root.join(dir))
}

/// A `cargo` command line. Select with `--workspace` even where one package would do: cargo unifies features over what is
/// selected, so that `-p lorad-train` alone would build candle a second time. The cargo that started us, so that a `+toolchain` is kept.
pub(crate) fn cargo<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(args);
    // Set by the outer `cargo run` for this process; an inner cargo would take them for its own.
    for name in [
        "CARGO_MANIFEST_DIR",
        "CARGO_MANIFEST_PATH",
        "CARGO_PKG_NAME",
        "CARGO_PKG_VERSION",
    ] {
        command.env_remove(name);
    }
    command
}

/// Builds everything, as the Rust tests do: another selection has other features, and would build candle again.
///
/// # Errors
/// If cargo fails.
pub(crate) fn build_all() -> Result<()> {
    must(&mut cargo([
        "build",
        "--release",
        "--quiet",
        "--workspace",
        "--all-targets",
    ]))
}

/// Name and value of the setting with which the server starts its workers: freed memory is kept for a minute. A comparison with
/// what a job takes under a server needs it too.
pub(crate) const AS_A_WORKER: (&str, &str) = ("MIMALLOC_PURGE_DELAY", "60000");

/// What a streamed program printed, and whether it succeeded.
pub(crate) struct Streamed {
    /// Exit status 0.
    pub(crate) ok: bool,
    /// Its stdout.
    pub(crate) stdout: String,
}

/// Runs a program, passing stdout and stderr on as they come.
///
/// # Errors
/// If the program cannot be started; an unsuccessful exit is not an error here.
pub(crate) fn stream(command: &mut Command) -> Result<Streamed> {
    announce(command);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("start {}", command.get_program().display()))?;
    let pipe = child.stdout.take().context("the child's stdout is piped")?;
    let mut stdout = String::new();
    let mut reader = BufReader::new(pipe);
    let mut line = Vec::new();
    while reader.read_until(b'\n', &mut line)? > 0 {
        let text = String::from_utf8_lossy(&line);
        print!("{text}");
        std::io::stdout().flush()?;
        stdout.push_str(&text);
        line.clear();
    }
    Ok(Streamed {
        ok: child.wait()?.success(),
        stdout,
    })
}

/// Runs a program to its end with its output passed on.
///
/// # Errors
/// If it cannot be started or exits unsuccessfully.
pub(crate) fn must(command: &mut Command) -> Result<()> {
    announce(command);
    // stdout is for results only (`cargo xtask oracle` prints a path), so a tool's own talk goes to stderr.
    let status = command
        .stdin(Stdio::null())
        .stdout(std::io::stderr())
        .status()
        .with_context(|| format!("start {}", command.get_program().display()))?;
    if !status.success() {
        bail!("{} failed ({status})", command.get_program().display());
    }
    Ok(())
}

/// A program's stdout.
///
/// # Errors
/// If it cannot be started or exits unsuccessfully; the message holds its stderr.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("start {}", command.get_program().display()))?;
    if !output.status.success() {
        let mut stderr = String::new();
        output.stderr.as_slice().read_to_string(&mut stderr).ok();
        bail!(
            "{} failed ({}):\n{stderr}",
            command.get_program().display(),
            output.status
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn announce(command: &Command) {
    let args: Vec<_> = command.get_args().map(OsStr::to_string_lossy).collect();
    let program = Path::new(command.get_program());
    let program = program.file_name().unwrap_or(program.as_os_str()).to_string_lossy();
    eprintln!("$ {program} {}", args.join(" "));
}
