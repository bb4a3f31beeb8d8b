//! What can be typed: commands, flags, help.

use std::{net::SocketAddr, path::PathBuf};

use clap::{Args, Parser, Subcommand};
use lorad::domain::Scope;

const EXAMPLES: &str = "\
Examples:
  lorad demo                          A complete training job on bundled data, in about two minutes
  lorad serve                         The server, with its dashboard at http://127.0.0.1:8080
  lorad train --base demo-icons --data pictures.zip --out results
  lorad doctor                        What this machine offers, and what to fix

Exit codes: 0 ok, 1 error, 2 wrong command line, 3 the job failed, 4 the job was cancelled";

/// A self-hosted LoRA fine-tuning server.
#[derive(Debug, Parser)]
#[command(name = "lorad", version, about, after_help = EXAMPLES, max_term_width = 100)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Start the server: HTTP API, dashboard, job queue.
    Serve(Serve),
    /// Run a complete job on bundled data and show the result.
    Demo(Demo),
    /// Train one adapter without a server.
    Train(Train),
    /// Look at this machine: devices, memory, disk, versions, base models.
    Doctor(Doctor),
    /// List the base models that can be trained.
    Models(Models),
    /// List the model families, or one family's hyperparameters.
    Families(Families),
    /// Print the OpenAPI 3.1 document of the HTTP API.
    Openapi,
    /// Ask a running server whether it is ready (exit 0) or not (exit 1).
    Healthcheck(Healthcheck),
    /// Make, list and revoke API keys.
    Keys(Keys),
    /// Show the settings.
    Config(Config),
    /// Check a data directory: the database, every result file by its hash, checkpoints. Changes nothing.
    Fsck(Fsck),
    /// Copy a data directory while the server is at work.
    Backup(Backup),
    /// Run one attempt at a job; started by the server.
    #[command(hide = true)]
    Worker(Worker),
    /// Decode pictures under limits; started by the server.
    #[command(hide = true, name = lorad::ingest::inspect::SUBCOMMAND)]
    InspectImages,
}

/// Settings that several commands share; each overrides the environment (`LORAD_…`) and the file.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct Settings {
    /// Folder for the database, datasets, jobs and results.
    #[arg(long, value_name = "DIR")]
    pub(crate) data_dir: Option<PathBuf>,
    /// Settings file (TOML); `lorad config default` prints one with every key explained.
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  lorad serve
  lorad serve --bind 127.0.0.1:9000 --data-dir /srv/lorad
  lorad keys create --name me --scope admin && lorad serve --bind 0.0.0.0:8080
  lorad serve --bind 0.0.0.0:8080 --insecure-no-auth     (only where the network is trusted)

Ctrl-C or SIGTERM stops it: running jobs write a checkpoint and go on after the next start.")]
pub(crate) struct Serve {
    /// Address to listen on; port 0 takes a free one.
    #[arg(long, value_name = "ADDR:PORT")]
    pub(crate) bind: Option<SocketAddr>,
    #[command(flatten)]
    pub(crate) settings: Settings,
    /// Serve other machines without API keys. Keys that exist are asked for all the same.
    #[arg(long)]
    pub(crate) insecure_no_auth: bool,
    /// Serve the dashboard from this folder instead of from the binary (for work on it).
    #[arg(long, value_name = "DIR")]
    pub(crate) static_dir: Option<PathBuf>,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  lorad demo               Stays up afterwards, for a look at the dashboard
  lorad demo --exit        Ends when the job does; exit code 3 if it failed")]
pub(crate) struct Demo {
    /// Address to listen on; by default port 8080 of this machine, or a free port if that is taken.
    #[arg(long, value_name = "ADDR:PORT")]
    pub(crate) bind: Option<SocketAddr>,
    #[command(flatten)]
    pub(crate) settings: Settings,
    /// End when the job ends.
    #[arg(long)]
    pub(crate) exit: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  lorad train --base demo-icons --data assets/silhouettes.zip --out results \\
      --set max_train_steps=400 --set learning_rate=2e-3 --prompt 'silhouette icon of rocket'
  lorad train --base /models/stable-diffusion-v1-5 --data my-pictures/ --out results --set lora_rank=16

`lorad families sd1` lists what --set knows. Ctrl-C saves what has been trained and stops; a second one stops at once.")]
pub(crate) struct Train {
    /// Base model: a diffusers folder, a checkpoint in one .safetensors file (with tokenizer/ beside it), or the id of a
    /// registered one (`lorad models`).
    #[arg(long, value_name = "DIR|FILE|ID")]
    pub(crate) base: String,
    /// Pictures with captions: a folder, or a zip or tar.gz archive.
    #[arg(long, value_name = "DIR|ARCHIVE")]
    pub(crate) data: PathBuf,
    /// Folder for the results; made if missing.
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,
    /// Name of the adapter; by default the name of the data.
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// A hyperparameter, e.g. `lora_rank=16`; may be repeated.
    #[arg(long, value_name = "KEY=VALUE", value_parser = key_value)]
    pub(crate) set: Vec<(String, serde_json::Value)>,
    /// An adapter to start from: a diffusers or kohya file, or a PEFT folder or archive. Modules, ranks and alphas are its own.
    #[arg(long, value_name = "FILE")]
    pub(crate) init_adapter: Option<PathBuf>,
    /// A prompt to draw before, during and after training; may be repeated.
    #[arg(long)]
    pub(crate) prompt: Vec<String>,
    /// Optimizer steps between pictures; 0: only before and after.
    #[arg(long, value_name = "STEPS", default_value_t = 100)]
    pub(crate) sample_every: u64,
    /// Seed of the first picture.
    #[arg(long, value_name = "SEED", default_value_t = 0)]
    pub(crate) sample_seed: u64,
    /// Device: `cpu`, `cuda:0`, …
    #[arg(long, default_value = "cpu")]
    pub(crate) device: String,
    /// Write every step's figures to this file, one JSON object a line.
    #[arg(long, value_name = "FILE")]
    pub(crate) metrics: Option<PathBuf>,
    /// Folder for encoded pictures and texts, which other runs find again; by default `cache` in the results. How much stays
    /// in it: `storage.cache_bytes` of the settings.
    #[arg(long, value_name = "DIR")]
    pub(crate) cache: Option<PathBuf>,
    /// Also write the whole pipeline with the adapter merged in.
    #[arg(long)]
    pub(crate) merged_pipeline: bool,
    /// Check everything and print the plan as JSON, without training.
    #[arg(long)]
    pub(crate) dry_run: bool,
    #[command(flatten)]
    pub(crate) settings: Settings,
}

#[derive(Debug, Args)]
pub(crate) struct Fsck {
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) settings: Settings,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  lorad backup --to /mnt/backup/2026-01-31
  lorad serve --data-dir /mnt/backup/2026-01-31      Jobs that were training go on from their newest checkpoint")]
pub(crate) struct Backup {
    /// New folder for the copy; itself a data directory.
    #[arg(long, value_name = "DIR")]
    pub(crate) to: PathBuf,
    #[command(flatten)]
    pub(crate) settings: Settings,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  lorad keys create --name me --scope admin
  lorad keys create --name ci --scope submit --expires 90d --queued-jobs 10
  lorad keys list
  lorad keys revoke key_0198…            Or by its first characters, lorad_1a2b3c4d

The first key locks the server: from then on every request needs one. Commands that talk to a server read LORAD_API_KEY.")]
pub(crate) struct Keys {
    #[command(subcommand)]
    pub(crate) command: KeysCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum KeysCommand {
    /// Make a key and print it, this once.
    Create(NewKey),
    /// List every key that was ever made.
    List {
        /// Print JSON.
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        settings: Settings,
    },
    /// Revoke a key, at once.
    Revoke {
        /// `key_…`, or the first characters of the key itself.
        id: String,
        #[command(flatten)]
        settings: Settings,
    },
}

#[derive(Debug, Args)]
pub(crate) struct NewKey {
    /// For people: whose, or what for.
    #[arg(long)]
    pub(crate) name: String,
    /// `read`; `submit` may also change; `admin` may also manage models, keys and webhooks.
    #[arg(long, value_parser = scope)]
    pub(crate) scope: Scope,
    /// When it ends: `90d`, `2030-01-31`; by default never.
    #[arg(long, value_name = "WHEN", allow_hyphen_values = true)]
    pub(crate) expires: Option<String>,
    /// Most requests in a minute.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) requests_per_minute: Option<u32>,
    /// Most jobs of it that wait.
    #[arg(long, value_name = "N")]
    pub(crate) queued_jobs: Option<u32>,
    /// Most jobs of it at work at the same time; more wait.
    #[arg(long, value_name = "N")]
    pub(crate) running_jobs: Option<u32>,
    /// Most bytes of all its datasets together.
    #[arg(long, value_name = "BYTES")]
    pub(crate) dataset_bytes: Option<u64>,
    #[command(flatten)]
    pub(crate) settings: Settings,
}

#[derive(Debug, Args)]
pub(crate) struct Doctor {
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) settings: Settings,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  lorad models
  lorad models pull owner/name               Download what the branch main is now
  lorad models pull owner/name@v1.0 --id mine

HF_ENDPOINT names another hub, HF_TOKEN is a token for private and gated models.")]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct Models {
    #[command(subcommand)]
    pub(crate) command: Option<ModelsCommand>,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) settings: Settings,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ModelsCommand {
    /// Download a base model from a hub into the data folder. An interrupted download goes on where it was.
    Pull(Pull),
}

#[derive(Debug, Args)]
pub(crate) struct Pull {
    /// `owner/name` or `owner/name@revision` (branch, tag or commit).
    pub(crate) hub_id: String,
    /// What to call it; its name on the hub, if not given.
    #[arg(long)]
    pub(crate) id: Option<String>,
    #[command(flatten)]
    pub(crate) settings: Settings,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  lorad families
  lorad families sd1
  lorad families sd1 --json        The JSON Schema")]
pub(crate) struct Families {
    /// Which family; without it all are listed.
    pub(crate) id: Option<String>,
    /// Print JSON.
    #[arg(long, conflicts_with = "markdown")]
    pub(crate) json: bool,
    /// Print the family's page for `docs/families`.
    #[arg(long, requires = "id")]
    pub(crate) markdown: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Healthcheck {
    /// Address of the server.
    #[arg(env = "LORAD_URL", default_value = "http://127.0.0.1:8080")]
    pub(crate) url: String,
}

#[derive(Debug, Args)]
pub(crate) struct Config {
    #[command(subcommand)]
    pub(crate) command: ConfigCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ConfigCommand {
    /// Print the settings that a server started now would use, as JSON.
    Show(Settings),
    /// Print the built-in settings file, with every key explained.
    Default,
}

#[derive(Debug, Args)]
pub(crate) struct Worker {
    /// Folder of the attempt, with its `spec.json`.
    #[arg(long, value_name = "DIR")]
    pub(crate) attempt_dir: PathBuf,
}

fn scope(text: &str) -> Result<Scope, String> {
    Scope::parse(text).ok_or_else(|| "expected read, submit or admin".to_owned())
}

/// `KEY=VALUE`; the value is JSON where it reads as such (numbers, booleans, lists), else text.
fn key_value(text: &str) -> Result<(String, serde_json::Value), String> {
    let (key, value) = text.split_once('=').ok_or("expected KEY=VALUE")?;
    if key.is_empty() {
        return Err("expected a name before `=`".to_owned());
    }
    let value = serde_json::from_str(value).unwrap_or_else(|_| value.into());
    Ok((key.to_owned(), value))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use clap::CommandFactory;
    use serde_json::json;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn set_takes_numbers_booleans_lists_and_words() {
        assert_eq!(key_value("learning_rate=2e-3").unwrap().1, json!(2e-3));
        assert_eq!(key_value("random_flip=true").unwrap().1, json!(true));
        assert_eq!(key_value("target_modules=attention").unwrap().1, json!("attention"));
        assert_eq!(
            key_value(r#"target_modules=["to_q","to_k"]"#).unwrap().1,
            json!(["to_q", "to_k"])
        );
        assert!(key_value("=1").is_err());
        assert!(key_value("rank").is_err());
    }
}
