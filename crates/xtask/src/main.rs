//! Developer commands of lorad, run as `cargo xtask COMMAND`.
//!
//! `test` is the whole check of a clean clone and all that `.ci/run` calls; the other commands are its parts or keep
//! generated files current. Nothing here ships: the server and the trainer know nothing of this crate.
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a developer's command line tool"
)]

mod bench;
mod docs;
mod estimate;
mod exec;
mod golden;
mod mirror;
mod provision;
mod report;
mod schemathesis;
mod sd15;
mod server;
mod suite;
mod tidy;
mod vendor;

use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(
    name = "cargo xtask",
    about = "Developer commands of lorad",
    disable_version_flag = true
)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// The whole test run: format, lints, architecture rules, Rust tests, browser tests, CUDA type check.
    ///
    /// Installs what a fresh machine lacks (Chromium, the Python oracle, npm packages) before it is needed, runs every
    /// part even when an earlier one failed, and ends with a line `N passed, N failed`.
    #[command(visible_alias = "ci")]
    Test {
        /// Only these parts; may be repeated.
        #[arg(long, value_enum)]
        only: Vec<suite::PartName>,
    },
    /// Install the Python reference implementations (torch, diffusers, peft, …) and print their interpreter's path.
    Oracle,
    /// Make the golden tensors of `tests/golden` with the Python oracle.
    Golden {
        /// Compare with the committed files instead of writing them.
        #[arg(long)]
        check: bool,
    },
    /// Time a training step of lorad beside the reference's.
    Bench {
        /// Shapes, e.g. demo-b16 sd15-b1; all that fit into 16 GB if none is given. `server`: what a server adds to a step.
        shapes: Vec<String>,
        /// Times that each side is run, in turns.
        #[arg(long, default_value_t = 2)]
        rounds: usize,
        /// Measured steps of each run; by default 20, for sd15 3.
        #[arg(long)]
        steps: Option<usize>,
    },
    /// Send the HTTP API requests made from its own description; none may be answered with 5xx.
    Schemathesis {
        /// Requests to make.
        #[arg(long, default_value_t = schemathesis::QUICK_CASES)]
        cases: u64,
        /// Seed of the first round.
        #[arg(long, default_value_t = 1)]
        seed: u64,
    },
    /// Feed the parsers of everything that comes from outside with mutated input.
    Fuzz {
        /// Seconds for each parser.
        #[arg(long, default_value_t = 60)]
        seconds: u64,
        /// Seed that a failure printed.
        #[arg(long)]
        seed: Option<u64>,
    },
    /// Take one training step at Stable Diffusion 1.5's size, on random weights, and check the result files.
    ///
    /// From a diffusers folder, from a checkpoint in one file and from a server's download of the folder, with and without the
    /// text encoder. Prints time and memory.
    Sd15 {
        /// Side of the training picture, pixels.
        #[arg(long, default_value_t = 128, conflicts_with = "tiny")]
        resolution: u32,
        /// With models as small as can be: seconds, to try the command itself.
        #[arg(long)]
        tiny: bool,
    },
    /// Compare estimates of memory and time with runs of a few small jobs.
    Estimate {
        /// Optimizer steps of each run.
        #[arg(long, default_value_t = 12)]
        steps: u32,
    },
    /// The architecture rules alone.
    Tidy,
    /// Check the vendored browser files against `static/vendor/VENDOR.toml`.
    Vendor,
    /// Write `docs/families/*.md` from the families' schemas.
    Docs {
        /// Fail if a committed page differs, instead of writing it.
        #[arg(long)]
        check: bool,
    },
}

fn main() -> ExitCode {
    match run(Args::parse().command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The fuzzers are tests of `tests/it`, which run for a moment in every test run.
fn fuzz(seconds: u64, seed: Option<u64>) -> Result<ExitCode> {
    let mut command = exec::cargo([
        "test",
        "--release",
        "--workspace",
        "--test",
        "it",
        "--",
        "fuzz::",
        "--nocapture",
    ]);
    command.env("LORAD_TEST_FUZZ_S", seconds.to_string());
    if let Some(seed) = seed {
        command.env("LORAD_TEST_SEED", seed.to_string());
    }
    let ok = exec::stream(&mut command)?.ok;
    Ok(if ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn run(command: Command) -> Result<ExitCode> {
    let root = exec::repository_root()?;
    std::env::set_current_dir(&root).with_context(|| format!("enter {}", root.display()))?;
    match command {
        Command::Test { only } => Ok(suite::run(&root, &only)),
        Command::Oracle => {
            println!("{}", provision::oracle(&root)?.display());
            Ok(ExitCode::SUCCESS)
        }
        Command::Golden { check } => golden::run(&root, check).map(|()| ExitCode::SUCCESS),
        Command::Bench { shapes, rounds, steps } => {
            bench::run(&root, &shapes, bench::Effort { rounds, steps }).map(|()| ExitCode::SUCCESS)
        }
        Command::Schemathesis { cases, seed } => schemathesis::run(&root, cases, seed).map(|_| ExitCode::SUCCESS),
        Command::Fuzz { seconds, seed } => fuzz(seconds, seed),
        Command::Sd15 { resolution, tiny } => {
            let size = if tiny {
                sd15::Size::tiny()
            } else {
                sd15::Size::full(resolution)
            };
            sd15::run(&root, &size).map(|()| ExitCode::SUCCESS)
        }
        Command::Estimate { steps } => estimate::run(&root, steps).map(|()| ExitCode::SUCCESS),
        Command::Tidy => tidy::print(&root),
        Command::Vendor => {
            let problems = vendor::check(&root);
            for problem in &problems {
                eprintln!("{problem}");
            }
            Ok(if problems.is_empty() {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            })
        }
        Command::Docs { check } => docs::run(&root, check).map(|()| ExitCode::SUCCESS),
    }
}
