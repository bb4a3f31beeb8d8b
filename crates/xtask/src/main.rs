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
mod provision;
mod report;
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
        /// Shapes, e.g. demo-b16 sd15-b1; all that fit into 16 GB if none is given.
        shapes: Vec<String>,
        /// Times that each side is run, in turns.
        #[arg(long, default_value_t = 2)]
        rounds: usize,
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
        Command::Bench { shapes, rounds } => bench::run(&root, &shapes, rounds).map(|()| ExitCode::SUCCESS),
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
