//! Where attempts run. One seam, so that a cluster engine can stand beside the local one: [`Executor`].
//!
//! An executor starts and ends processes and says how they are; it knows no job states, no database and no HTTP. Called
//! by `scheduler` alone.

pub mod local;
mod process;

pub(crate) use process::start_time;

use std::path::PathBuf;

use async_trait::async_trait;

use crate::domain::{Exit, JobId};

/// Name and value of a setting of mimalloc, which it reads as the process starts: milliseconds until freed memory goes back to
/// the kernel. A training step frees and takes the same blocks again; after mimalloc's own 10 ms each costs page faults and
/// a pass of zeros.
pub const KEEP_FREED_MEMORY: (&str, &str) = ("MIMALLOC_PURGE_DELAY", "60000");

/// One attempt at one job.
pub type AttemptKey = (JobId, u32);

/// What to start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launch {
    /// Which attempt.
    pub key: AttemptKey,
    /// Its directory, which holds `spec.json`; absolute.
    pub dir: PathBuf,
    /// Its secret token.
    pub token: String,
    /// Where it reports.
    pub socket: PathBuf,
    /// Threads for CPU kernels; 0: one per core.
    pub threads: u64,
    /// Most bytes that it may allocate; 0: no limit.
    pub memory_bytes: u64,
    /// Its niceness.
    pub nice: u64,
    /// Pause between its posts when it has nothing to say, milliseconds.
    pub heartbeat_ms: u64,
    /// Its lease, milliseconds.
    pub lease_ms: u64,
}

/// A started process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Started {
    /// Process id.
    pub pid: u32,
    /// Its start time, in clock ticks since boot; tells a reused pid. `None` where the system does not say.
    pub pid_start: Option<u64>,
}

/// How to stop a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// SIGTERM: checkpoint and end.
    Terminate,
    /// SIGKILL to the whole process group.
    Kill,
}

/// How an attempt's process is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Observed {
    /// Alive.
    Running,
    /// Dead.
    Exited(Exit),
    /// This executor has never seen it: it was started by a server before this one.
    Unknown,
}

/// Starts, stops and watches processes.
#[async_trait]
pub trait Executor: Send + Sync {
    /// The devices it can put a job on; one slot each.
    fn caps(&self) -> &[String];

    /// Starts an attempt.
    ///
    /// # Errors
    /// If no process came up.
    async fn submit(&self, launch: &Launch) -> std::io::Result<Started>;

    /// Takes over an attempt that an earlier server started. Whether that very process still lives.
    fn adopt(&self, key: AttemptKey, process: Started, dir: PathBuf) -> bool;

    /// Sends a signal; does not wait. A process that is gone already is no error.
    fn stop(&self, key: AttemptKey, how: Stop);

    /// How an attempt is.
    fn observe(&self, key: AttemptKey) -> Observed;

    /// Forgets an attempt that has ended.
    fn forget(&self, key: AttemptKey);
}
