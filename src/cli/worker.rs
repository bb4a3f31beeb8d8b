//! `lorad worker` (hidden): one attempt at one job, started by the server.

use lorad::{agent, telemetry};

use super::args::Worker;

/// Runs the attempt and ends this process with the exit code that the server reads.
pub(crate) fn run(args: &Worker) -> ! {
    telemetry::init_worker();
    std::process::exit(agent::run(&args.attempt_dir))
}
