//! Logging: human text or JSON lines on stderr, filtered by `log.filter`.
//!
//! Called once by each command that runs long (`serve`, `demo`, `worker`).

use std::io::IsTerminal;

use tracing_subscriber::{EnvFilter, fmt, layer::SubscriberExt, util::SubscriberInitExt};

use crate::config::Log;

/// Starts logging to stderr. A second call in one process changes nothing, so that tests may start many servers.
pub fn init(log: &Log) {
    // The filter was validated with the settings; should it not parse, everything at `info` is better than silence.
    let filter = EnvFilter::try_new(&log.filter).unwrap_or_else(|_| EnvFilter::new("info"));
    let registry = tracing_subscriber::registry().with(filter);
    let text = fmt::layer().with_writer(std::io::stderr);
    let started = if log.json {
        registry.with(text.json().flatten_event(true)).try_init()
    } else {
        registry
            .with(text.with_ansi(std::io::stderr().is_terminal()))
            .try_init()
    };
    drop(started);
}

/// Starts logging for a worker: JSON lines on stderr, which is its `worker.log`.
pub fn init_worker() {
    init(&Log {
        filter: "info".to_owned(),
        json: true,
    });
}
