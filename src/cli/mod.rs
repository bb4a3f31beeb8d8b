//! The command line: parses, calls, prints. Thin; holds no rule of the server or the trainer.
//!
//! stdout carries data (tables, JSON, paths), stderr talk (progress, hints). Exit codes are in [`Exit`].
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "printing is what a command line does"
)]

mod args;
mod client;
mod config;
mod demo;
mod doctor;
mod families;
mod images;
mod keys;
mod models;
mod progress;
mod serve;
mod tables;
mod train;
mod upkeep;
mod worker;

use std::process::ExitCode;

use clap::Parser;

use args::{Cli, Command};

/// How the program ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    /// All well.
    Ok = 0,
    /// The command could not do its work; stderr says why.
    Error = 1,
    // 2 is clap's, for a wrong command line.
    /// The job ran and failed.
    JobFailed = 3,
    /// The job was cancelled.
    Cancelled = 4,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// Parses the command line and runs it.
pub(crate) fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli) {
        Ok(exit) => exit.into(),
        Err(error) => {
            eprintln!("error: {error:#}");
            if let Some(problem) = error.downcast_ref::<lorad_proto::problem::Problem>() {
                print_problem_details(problem);
            }
            Exit::Error.into()
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<Exit> {
    match cli.command {
        Command::Serve(args) => serve::run(&args),
        Command::Demo(args) => demo::run(&args),
        Command::Train(args) => train::run(&args),
        Command::Doctor(args) => doctor::run(&args),
        Command::Models(args) => models::run(&args),
        Command::Families(args) => families::run(&args),
        Command::Openapi => openapi(),
        Command::Healthcheck(args) => client::healthcheck(&args.url),
        Command::Keys(args) => keys::run(&args),
        Command::Config(args) => config::run(&args),
        Command::Fsck(args) => upkeep::run_fsck(&args),
        Command::Backup(args) => upkeep::run_backup(&args),
        Command::Worker(args) => worker::run(&args),
        Command::InspectImages => images::run(),
    }
}

fn openapi() -> anyhow::Result<Exit> {
    println!("{}", serde_json::to_string_pretty(&lorad::http::openapi())?);
    Ok(Exit::Ok)
}

/// Field errors and hint of a problem, one a line; the problem itself is the error's own text.
pub(crate) fn print_problem_details(problem: &lorad_proto::problem::Problem) {
    for error in &problem.errors {
        eprintln!("  {}: {}", error.pointer, error.detail);
    }
    if !problem.hint.is_empty() {
        eprintln!("hint: {}", problem.hint);
    }
}

/// A tokio runtime for one command.
pub(crate) fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build()
}
