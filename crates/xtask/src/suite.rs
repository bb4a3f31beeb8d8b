//! The test run: its parts in order, each provisioned, run and counted, whatever the parts before it did.

use std::{fs, path::Path, process::ExitCode, thread, time::Instant};

use anyhow::{Context, Result, anyhow, ensure};
use clap::ValueEnum;

use crate::{
    docs, exec, provision,
    report::{self, Tally},
    schemathesis, sd15, tidy, vendor,
};

/// The parts of `cargo xtask test`, in the order in which they run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum PartName {
    /// `cargo fmt --check`.
    Fmt,
    /// Clippy over everything, warnings denied.
    Clippy,
    /// The architecture rules, the vendored files' hashes.
    Rules,
    /// Unit, integration, documentation and numeric tests, with the Python oracle.
    Rust,
    /// The generated pages are current.
    Docs,
    /// The HTTP API against its own description.
    Api,
    /// A folder, a file and a hub's download of one tiny model give one adapter.
    Bases,
    /// The dashboard in a real browser.
    Browser,
    /// The soak for five minutes and each fuzzer for one, which `rust` runs for moments.
    Endurance,
    /// Only the trainer's interoperability tests with real Python tools (part of `rust`).
    Interop,
    /// Type check of the CUDA build, without a CUDA toolkit.
    Cuda,
}

impl PartName {
    fn heading(self) -> &'static str {
        match self {
            Self::Fmt => "format",
            Self::Clippy => "lints",
            Self::Rules => "architecture rules",
            Self::Rust => "unit, integration and interoperability tests",
            Self::Docs => "generated pages",
            Self::Api => "API against its description",
            Self::Bases => "base models of every kind",
            Self::Browser => "browser tests",
            Self::Endurance => "soak and fuzzing, longer",
            Self::Interop => "interoperability with Python tools",
            Self::Cuda => "CUDA type check",
        }
    }

    fn run(self, root: &Path) -> Result<Tally> {
        match self {
            Self::Fmt => check("cargo fmt", exec::cargo(["fmt", "--all", "--check"])),
            Self::Clippy => check(
                "cargo clippy",
                exec::cargo([
                    "clippy",
                    "--release",
                    "--workspace",
                    "--all-targets",
                    "--",
                    "-D",
                    "warnings",
                ]),
            ),
            Self::Rules => rules(root),
            Self::Rust => rust(root, &["--workspace"]),
            Self::Docs => Ok(match docs::run(root, true) {
                Ok(()) => Tally::check("docs", true),
                Err(error) => Tally::check(&format!("docs: {error:#}"), false),
            }),
            Self::Api => Ok(match schemathesis::run(root, schemathesis::QUICK_CASES, 1) {
                Ok(_) => Tally::check("schemathesis", true),
                Err(error) => Tally::check(&format!("schemathesis: {error:#}"), false),
            }),
            Self::Bases => Ok(match sd15::run(root, &sd15::Size::tiny()) {
                Ok(()) => Tally::check("sd15 --tiny", true),
                Err(error) => Tally::check(&format!("sd15 --tiny: {error:#}"), false),
            }),
            Self::Browser => browser(root),
            Self::Endurance => endurance(),
            Self::Interop => rust(root, &["--workspace", "--test", "interop"]),
            Self::Cuda => cuda(root),
        }
    }
}

/// Runs the given parts, or all, and prints the tally.
pub(crate) fn run(root: &Path, only: &[PartName]) -> ExitCode {
    let started = Instant::now();
    let mut total = Tally::default();
    let all = PartName::value_variants().iter().copied();
    // Interoperability is inside `rust`; on its own only when asked for.
    let parts: Vec<_> = if only.is_empty() {
        all.filter(|part| *part != PartName::Interop).collect()
    } else {
        all.filter(|part| only.contains(part)).collect()
    };
    let mut lines = Vec::new();
    for part in parts {
        println!("\n=== {} ===", part.heading());
        let part_started = Instant::now();
        let tally = part.run(root).unwrap_or_else(|error| {
            eprintln!("error: {error:#}");
            Tally::check(&format!("{}: {error:#}", part.heading()), false)
        });
        lines.push(format!(
            "{:<46} {:>5} passed {:>3} failed {:>6.0} s",
            part.heading(),
            tally.passed,
            tally.failed,
            part_started.elapsed().as_secs_f64()
        ));
        total.add(tally);
    }
    println!("\n=== summary ({:.0} s) ===", started.elapsed().as_secs_f64());
    for line in lines {
        println!("{line}");
    }
    for failure in &total.failures {
        println!("failed: {failure}");
    }
    println!("{} passed, {} failed", total.passed, total.failed);
    if total.failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn check(name: &str, mut command: std::process::Command) -> Result<Tally> {
    Ok(Tally::check(name, exec::stream(&mut command)?.ok))
}

fn rules(root: &Path) -> Result<Tally> {
    let mut total = Tally::default();
    for outcome in tidy::run(root)? {
        println!("{outcome}");
        total.add(Tally::check(
            &format!("rule {}", outcome.rule),
            outcome.violations.is_empty(),
        ));
    }
    let problems = vendor::check(root);
    for problem in &problems {
        println!("{problem}");
    }
    total.add(Tally::check("vendored files", problems.is_empty()));
    Ok(total)
}

fn rust(root: &Path, selection: &[&str]) -> Result<Tally> {
    let python = provision::oracle(root)?;
    let mut command = exec::cargo(["test", "--release", "--no-fail-fast"]);
    command.args(selection).env("LORAD_ORACLE_PYTHON", python);
    let streamed = exec::stream(&mut command)?;
    Ok(report::cargo_test(&streamed.stdout).with_exit("cargo test", streamed.ok))
}

/// Seconds of the soak.
const SOAK_S: u64 = 300;
/// Seconds of each fuzzer; on two threads they take no longer than the soak.
const FUZZ_S: u64 = 60;

/// Soak and fuzzers side by side: a soak mostly waits.
fn endurance() -> Result<Tally> {
    let tests = |variable: &str, seconds: u64, args: &[&str]| {
        let mut command = exec::cargo(["test", "--release", "--workspace", "--test", "it", "--", "--nocapture"]);
        command.args(args).env(variable, seconds.to_string());
        command
    };
    let mut soak = tests("LORAD_TEST_SOAK_S", SOAK_S, &["soak::"]);
    let mut fuzz = tests("LORAD_TEST_FUZZ_S", FUZZ_S, &["fuzz::", "--test-threads=2"]);
    let (soak, fuzz) = thread::scope(|scope| {
        let soak = scope.spawn(|| exec::stream(&mut soak));
        let fuzz = exec::stream(&mut fuzz);
        (soak.join(), fuzz)
    });
    let soak = soak.map_err(|_| anyhow!("the soak's thread panicked"))??;
    let fuzz = fuzz?;
    let mut tally = report::cargo_test(&soak.stdout).with_exit("soak", soak.ok);
    tally.add(report::cargo_test(&fuzz.stdout).with_exit("fuzz", fuzz.ok));
    Ok(tally)
}

fn browser(root: &Path) -> Result<Tally> {
    let folder = root.join("tests/browser");
    let chromium = provision::chromium()?;
    provision::npm_packages(&folder)?;
    exec::build_all()?;
    let mut tests: Vec<_> = fs::read_dir(&folder)
        .with_context(|| format!("read {}", folder.display()))?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.ends_with(".test.mjs") || name.ends_with(".test.js"))
        .collect();
    tests.sort();
    ensure!(!tests.is_empty(), "no *.test.mjs in tests/browser");
    let mut command = std::process::Command::new("node");
    command
        .args(["--test", "--test-reporter=tap", "--test-concurrency=1"])
        .args(tests)
        .current_dir(&folder)
        .env("LORAD_CHROMIUM", chromium)
        .env("LORAD_BIN", exec::target_dir(root).join("release/lorad"));
    let streamed = exec::stream(&mut command)?;
    Ok(report::node_tap(&streamed.stdout).with_exit("node --test", streamed.ok))
}

/// Stands in for `nvcc`: answers the questions that the kernels' build script asks and writes empty outputs. Enough for a
/// type check, which links and runs nothing.
const STUB_NVCC: &str = include_str!("stub-nvcc.sh");

fn cuda(root: &Path) -> Result<Tally> {
    let target = exec::target_dir(root);
    let stub = target.join("stub");
    fs::create_dir_all(&stub).with_context(|| format!("create {}", stub.display()))?;
    let nvcc = stub.join("nvcc");
    fs::write(&nvcc, STUB_NVCC).with_context(|| format!("write {}", nvcc.display()))?;
    exec::must(std::process::Command::new("chmod").arg("+x").arg(&nvcc))?;
    let mut search = vec![stub];
    search.extend(std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()));
    // Both packages in one selection: cargo then builds every dependency once.
    let mut command = exec::cargo(["check", "--release", "--package", "lorad", "--package", "lorad-train"]);
    command
        .args(["--features", "lorad/cuda,lorad-train/cuda"])
        .env("PATH", std::env::join_paths(&search)?)
        .env("NVCC", &nvcc)
        .env("CUDA_COMPUTE_CAP", "80")
        .env_remove("CUDA_HOME")
        // Its own folder: the stub's empty kernels must never be found by a real CUDA build.
        .env("CARGO_TARGET_DIR", target.join("cuda"));
    check("cargo check --features cuda", command)
}
