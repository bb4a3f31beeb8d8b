//! The lorad server: LoRA fine-tuning jobs over HTTP, one OS process per attempt.
//!
//! Where to start reading: `serve` wires everything; [`domain`] says what the server talks about; [`store`] is the only
//! SQL; `scheduler` moves jobs. One job, file by file, is in `ARCHITECTURE.md`.
//!
//! - [`config`]: layered settings; `configs/default.toml` documents each key.
//! - [`domain`]: pure values and decisions: ids, the job state machine, attempts, metrics.
//! - [`store`]: SQLite.
//! - [`app`]: what every request handler holds, and the acts that need more than the store.
//! - [`events`]: from the store to viewers, gapless.
//! - [`blobs`]: published files.
//! - [`http`]: the API and the dashboard.
//! - [`ingest`]: uploaded archives into datasets.

pub mod app;
pub mod blobs;
pub mod config;
pub mod domain;
pub mod events;
pub mod http;
pub mod ingest;
pub mod store;
