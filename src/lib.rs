//! The lorad server: LoRA fine-tuning jobs over HTTP, one OS process per attempt.
//!
//! Where to start reading: [`serve`] wires everything; [`domain`] says what the server talks about; [`store`] is the only
//! SQL; [`scheduler`] moves jobs. One job, file by file, is in `ARCHITECTURE.md`.
//!
//! - [`serve`] · the whole server, wired.
//! - [`config`] and [`telemetry`] · layered settings (`configs/default.toml` documents each key), logging.
//! - [`domain`] · pure values and decisions: ids, the job state machine, attempts, metrics.
//! - [`store`] · SQLite.
//! - [`app`] · what every request handler holds, and the acts that need more than the store.
//! - [`scheduler`] and [`executor`] · jobs onto devices, attempts into processes.
//! - [`agent`] and `agent_api` · the worker protocol, from inside the worker and from the server.
//! - [`events`] · from the store to viewers, gapless.
//! - `checkpoint` · whether a checkpoint on disk is whole.
//! - [`blobs`] and [`builtin`] · published files, the bundled base model.
//! - [`http`] · the API and the dashboard.
//! - [`hub`] and [`downloads`] · base models from a hub.
//! - [`ingest`] · uploaded archives into datasets.
//! - [`space`] · room on the disk, and the ballast file.
//! - [`webhooks`] · outward calls.
//! - [`secret`] and [`network`] · API keys as text, networks of addresses.
//! - [`traces`] · spans of requests, attempts and jobs for a collector.
//! - [`upkeep`] · checking and copying a whole data directory.
//! - [`trainer`] · the only file that names the trainer.

pub mod agent;
mod agent_api;
pub mod app;
pub mod blobs;
pub mod builtin;
mod checkpoint;
pub mod config;
pub mod domain;
pub mod downloads;
pub mod events;
pub mod executor;
pub mod http;
pub mod hub;
pub mod ingest;
pub mod network;
pub mod scheduler;
pub mod secret;
pub mod serve;
pub mod space;
pub mod store;
pub mod telemetry;
pub mod traces;
pub mod trainer;
pub mod upkeep;
pub mod webhooks;
