//! Fault points: every step that makes something durable has a name here, at which a test can end the process or let the
//! step fail.
//!
//! A point does nothing until [`install`] gives the process a hook, and no code that ships calls it: what arms points,
//! aborts and makes errors lies in the tests (`tests/it/faults.rs`), so that the binary that users run is the one that is
//! tested, and holds no switch (ADR 15). The tests go through [`Point::ALL`]: a new point is covered without a new test.
//!
//! Knows no file and no database. Called by the server and by the trainer.

use std::{
    io::{self, Write},
    sync::OnceLock,
};

/// Where within a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// Nothing of it has happened.
    Before,
    /// Half of the bytes are written; only in [`write_all`].
    Half,
    /// It is done, and nobody was told.
    After,
}

impl Moment {
    /// Its spelling in a test's output.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Before => "before",
            Self::Half => "half",
            Self::After => "after",
        }
    }
}

macro_rules! points {
    ($($(#[$doc:meta])+ $variant:ident = $name:literal, $owner:ident $(, $write:ident)?;)+) => {
        /// A step that makes something durable.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Point {
            $($(#[$doc])+ $variant,)+
        }

        impl Point {
            /// Every point.
            pub const ALL: &[Self] = &[$(Self::$variant),+];

            /// Its name.
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)+
                }
            }

            /// Which process passes it.
            pub fn owner(self) -> Owner {
                match self {
                    $(Self::$variant => Owner::$owner,)+
                }
            }

            /// The moments that it has.
            pub fn moments(self) -> &'static [Moment] {
                match self {
                    $(Self::$variant => points!(@moments $($write)?),)+
                }
            }
        }
    };
    (@moments write) => { &[Moment::Before, Moment::Half, Moment::After] };
    (@moments) => { &[Moment::Before, Moment::After] };
}

/// Which process passes a point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owner {
    /// The server.
    Server,
    /// A worker, whatever it trains.
    Worker,
    /// The training loop.
    Trainer,
}

points! {
    /// Stored paths follow a data directory that was moved.
    MovePaths = "store.move_paths", Server;
    /// The bundled base model is put in place.
    UnpackModel = "builtin.unpack", Server;
    /// A setting.
    WriteSetting = "store.write_setting", Server;
    /// Keys of requests that an earlier server did not finish are given back.
    GiveKeysBack = "store.give_keys_back", Server;
    /// A base model is registered.
    InsertModel = "store.insert_model", Server;
    /// A base model is forgotten.
    DeleteModel = "store.delete_model", Server;
    /// A part of an upload goes to staging.
    WriteUpload = "upload.write", Server, write;
    /// A file of a dataset gets its place.
    PlaceItem = "ingest.place_item", Server;
    /// A dataset's list of items, or its report.
    WriteIndex = "ingest.write_index", Server, write;
    /// A dataset's folder is flushed.
    SyncDataset = "ingest.sync", Server;
    /// A dataset appears under its final name.
    RenameDataset = "ingest.rename", Server;
    /// The folder of datasets is flushed.
    SyncDatasets = "ingest.sync_parent", Server;
    /// A dataset is recorded.
    InsertDataset = "store.insert_dataset", Server;
    /// A dataset is forgotten.
    DeleteDataset = "store.delete_dataset", Server;
    /// An idempotency key is taken.
    TakeKey = "store.take_key", Server;
    /// The key of a request that failed is given back.
    GiveKeyBack = "store.give_key_back", Server;
    /// A job is accepted.
    InsertJob = "store.insert_job", Server;
    /// Name, notes, tags or priority.
    UpdateJob = "store.update_job", Server;
    /// A cancellation.
    CancelJob = "store.cancel_job", Server;
    /// A pause.
    PauseJob = "store.pause_job", Server;
    /// A pause is over.
    ResumeJob = "store.resume_job", Server;
    /// A checkpoint or samples are asked for.
    AskJob = "store.ask_job", Server;
    /// A job is forgotten.
    DeleteJob = "store.delete_job", Server;
    /// A job is taken for a device.
    ClaimJob = "store.claim_job", Server;
    /// What a worker is told.
    WriteSpec = "attempt.write_spec", Server, write;
    /// A worker's process is recorded.
    RecordProcess = "store.record_process", Server;
    /// A batch of a worker's events.
    StoreEvents = "store.store_events", Server;
    /// A worker's process is dead.
    EndAttempt = "store.end_attempt", Server;
    /// A piece of a result file goes to staging.
    StageFile = "blobs.stage", Server;
    /// A result file appears under its final name.
    PublishFile = "blobs.publish", Server;
    /// A job is complete.
    CompleteJob = "store.complete_job", Server;
    /// A job whose results cannot be used has failed.
    FailJob = "store.fail_job", Server;
    /// Keys, sessions, webhooks, downloads of models and the audit log.
    Manage = "store.manage", Server;

    /// An event goes to the spool.
    SpoolEvent = "spool.write", Worker, write;
    /// The spool is flushed: with a checkpoint and with the final event.
    SyncSpool = "spool.sync", Worker;
    /// The note that tells a server which is not the parent how a worker ended.
    WriteExitNote = "attempt.write_exit", Worker, write;

    /// A checkpoint's adapter.
    WriteAdapter = "checkpoint.adapter", Trainer, write;
    /// A checkpoint's optimizer state.
    WriteOptimizer = "checkpoint.optimizer", Trainer, write;
    /// A checkpoint's counters.
    WriteState = "checkpoint.state", Trainer, write;
    /// A checkpoint's manifest.
    WriteManifest = "checkpoint.manifest", Trainer, write;
    /// A checkpoint's folder is flushed.
    SyncCheckpoint = "checkpoint.sync", Trainer;
    /// A checkpoint appears under its final name.
    RenameCheckpoint = "checkpoint.rename", Trainer;
    /// The folder of checkpoints is flushed.
    SyncCheckpoints = "checkpoint.sync_parent", Trainer;
    /// A checkpoint is announced.
    AnnounceCheckpoint = "checkpoint.announce", Trainer;
    /// Checkpoints beyond the number to keep are deleted.
    PruneCheckpoints = "checkpoint.prune", Trainer;
    /// A sample picture is written.
    WriteSample = "sample.write", Trainer;
    /// The result files are written.
    WriteResults = "results.write", Trainer;
}

type Hook = Box<dyn Fn(Point, Moment) -> io::Result<()> + Send + Sync>;

static HOOK: OnceLock<Hook> = OnceLock::new();

/// Gives this process a hook, which is called at every moment of every point: it may end the process, or return the error
/// with which the step fails. For tests; only the first call counts.
pub fn install(hook: impl Fn(Point, Moment) -> io::Result<()> + Send + Sync + 'static) {
    // The second hook of a process would be a mistake of the test, which then sees its faults missing.
    drop(HOOK.set(Box::new(hook)));
}

/// Passes a moment of a point.
///
/// # Errors
/// What the hook says; never without one.
pub fn pass(point: Point, moment: Moment) -> io::Result<()> {
    HOOK.get().map_or(Ok(()), |hook| hook(point, moment))
}

/// Does a step between the two moments of its point.
///
/// # Errors
/// The step's, or the hook's.
pub fn around<T, E: From<io::Error>>(point: Point, act: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
    pass(point, Moment::Before)?;
    let done = act()?;
    pass(point, Moment::After)?;
    Ok(done)
}

/// Writes all bytes, with a moment before, half-way and after.
///
/// # Errors
/// The writer's, or the hook's.
pub fn write_all(point: Point, to: &mut impl Write, bytes: &[u8]) -> io::Result<()> {
    pass(point, Moment::Before)?;
    let (head, tail) = bytes.split_at(bytes.len() / 2);
    to.write_all(head)?;
    pass(point, Moment::Half)?;
    to.write_all(tail)?;
    pass(point, Moment::After)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_without_a_hook_nothing_happens() {
        let names: std::collections::BTreeSet<_> = Point::ALL.iter().map(|point| point.name()).collect();
        assert_eq!(names.len(), Point::ALL.len());
        for point in Point::ALL {
            for moment in point.moments() {
                assert!(pass(*point, *moment).is_ok());
            }
        }
        let mut written = Vec::new();
        assert!(write_all(Point::SpoolEvent, &mut written, b"abc").is_ok());
        assert_eq!(written, b"abc");
    }
}
