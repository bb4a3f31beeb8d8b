//! Settings in layers: `configs/default.toml` (compiled in) < file < environment `LORAD_<SECTION>__<KEY>` < flags.
//!
//! Every key is described in `configs/default.toml`; unknown keys and values out of range are refused, all at once. Knows
//! nothing of what the settings are for. Called by `cli` once at the start; everyone reads [`Config`].

use std::{
    collections::HashMap,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use config::{Environment, File, FileFormat};
use serde::{Deserialize, Serialize};

use crate::{domain::RetryLimits, network::Networks};

/// The defaults, with the documentation of every key.
pub const DEFAULTS: &str = include_str!("../configs/default.toml");

/// Keys that hold lists, so that the environment can set them.
const LISTS: &[&str] = &[
    "server.allowed_hosts",
    "server.trusted_proxies",
    "scheduler.devices",
    "models.roots",
    "webhooks.allow_private",
    "webhooks.retry_after_ms",
];

/// All settings.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The public listener.
    pub server: Server,
    /// Where things are kept.
    pub storage: Storage,
    /// What is refused.
    pub limits: Limits,
    /// Devices, leases, retries.
    pub scheduler: Scheduler,
    /// Base models.
    pub models: Models,
    /// Outward calls.
    pub webhooks: Webhooks,
    /// Logging.
    pub log: Log,
    /// Traces.
    pub traces: Traces,
}

/// `[server]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Server {
    /// Address and port; port 0 picks a free one.
    pub bind: SocketAddr,
    /// Whether requests need an API key.
    pub auth: Auth,
    /// Hours, 1..=8760.
    pub session_hours: u64,
    /// Entries, 100..=100000000.
    pub audit_entries: u64,
    /// Proxies whose `X-Forwarded-For` is believed.
    pub trusted_proxies: Networks,
    /// Allow other addresses than loopback without API keys.
    pub insecure_no_auth: bool,
    /// Accepted `Host` names besides the bind address and loopback.
    pub allowed_hosts: Vec<String>,
    /// Folder that the dashboard is served from; empty: the files in the binary.
    pub static_dir: PathBuf,
    /// Milliseconds, 1000..=3600000.
    pub request_timeout_ms: u64,
    /// Milliseconds, 1000..=600000.
    pub header_timeout_ms: u64,
    /// Milliseconds, 1000..=60000.
    pub sse_ping_ms: u64,
    /// Event streams, 1..=100000.
    pub max_streams: u64,
    /// Milliseconds, 0..=600000.
    pub shutdown_grace_ms: u64,
}

/// When requests need an API key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Auth {
    /// As soon as a key was made.
    Auto,
    /// Always.
    Required,
}

/// `[storage]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Storage {
    /// The data directory.
    pub data_dir: PathBuf,
    /// Whether files are flushed to disk before they are announced.
    pub fsync: bool,
    /// Bytes, 0..=1099511627776.
    pub min_free_bytes: u64,
    /// Bytes, 0..=1073741824.
    pub ballast_bytes: u64,
    /// Bytes, 0..=1125899906842624.
    pub cache_bytes: u64,
}

/// `[limits]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Bytes.
    pub upload_bytes: u64,
    /// Bytes.
    pub json_bytes: u64,
    /// Files.
    pub archive_entries: u64,
    /// Bytes.
    pub archive_unpacked_bytes: u64,
    /// Unpacked to packed.
    pub archive_ratio: u64,
    /// Width times height.
    pub image_pixels: u64,
    /// Characters.
    pub caption_chars: u64,
    /// Jobs.
    pub queued_jobs: u64,
    /// Requests in a minute; 0: any number.
    pub requests_per_minute: u32,
}

/// `[scheduler]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scheduler {
    /// `cpu`, `cuda:0`, `metal:0`; one slot each.
    pub devices: Vec<String>,
    /// Threads of CPU kernels; 0: one per core.
    pub threads: u64,
    /// Bytes, 0..=1125899906842624.
    pub worker_memory_bytes: u64,
    /// Niceness of workers, 0..=19.
    pub nice: u64,
    /// Milliseconds, 50..=60000.
    pub tick_ms: u64,
    /// Milliseconds, 2000..=3600000.
    pub lease_ms: u64,
    /// Milliseconds, 0..=600000.
    pub lease_grace_ms: u64,
    /// Milliseconds, 100..=60000.
    pub heartbeat_ms: u64,
    /// Milliseconds, 0..=3600000.
    pub adopt_window_ms: u64,
    /// Milliseconds, 0..=600000.
    pub kill_grace_ms: u64,
    /// 1..=1000.
    pub max_failed_attempts: u64,
    /// Milliseconds, 0..=600000.
    pub retry_backoff_ms: u64,
    /// Program that runs as worker; empty: this one.
    pub worker_program: PathBuf,
}

/// `[models]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Models {
    /// Folders under which base models may be registered.
    pub roots: Vec<PathBuf>,
    /// Address of a hub; empty: the default; `off`: none.
    pub hub_endpoint: String,
}

/// `[webhooks]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Webhooks {
    /// Networks that may be called though they are not public.
    pub allow_private: Networks,
    /// Whether unencrypted http is allowed.
    pub allow_http: bool,
    /// Milliseconds, 100..=300000.
    pub timeout_ms: u64,
    /// Milliseconds before each further attempt, each 0..=604800000.
    #[serde(deserialize_with = "numbers")]
    pub retry_after_ms: Vec<u64>,
    /// Days, 1..=365.
    pub disable_after_days: u64,
    /// Days, 1..=3650.
    pub keep_days: u64,
    /// Milliseconds, 10..=3600000.
    pub poll_ms: u64,
}

/// `[log]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Log {
    /// `EnvFilter` syntax.
    pub filter: String,
    /// One JSON object per line.
    pub json: bool,
}

/// `[traces]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Traces {
    /// Address of a collector; empty: what the environment says; `off`: none.
    pub otlp_endpoint: String,
}

fn is_http_address(text: &str) -> bool {
    reqwest::Url::parse(text).is_ok_and(|url| matches!(url.scheme(), "http" | "https") && url.has_host())
}

/// A list of numbers. One alone is a list of one: the environment's parser makes a number of `100`, not a list.
fn numbers<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Vec<u64>, D::Error> {
    struct Numbers;
    impl<'de> serde::de::Visitor<'de> for Numbers {
        type Value = Vec<u64>;

        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("a list of whole numbers")
        }

        fn visit_i64<E: serde::de::Error>(self, n: i64) -> Result<Vec<u64>, E> {
            u64::try_from(n).map(|n| vec![n]).map_err(E::custom)
        }

        fn visit_seq<A: serde::de::SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<u64>, A::Error> {
            let mut numbers = Vec::new();
            while let Some(n) = seq.next_element()? {
                numbers.push(n);
            }
            Ok(numbers)
        }
    }
    deserializer.deserialize_any(Numbers)
}

/// Why the settings cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A layer could not be read, or holds an unknown key or a value of the wrong type.
    #[error("cannot read the settings: {0}")]
    Read(#[from] config::ConfigError),
    /// Values out of range, one line each.
    #[error("settings out of range:\n  {}", .0.join("\n  "))]
    Invalid(Vec<String>),
}

impl Config {
    /// The defaults alone.
    ///
    /// # Errors
    /// Never with the compiled-in file; a test makes sure.
    pub fn defaults() -> Result<Self, ConfigError> {
        Self::from_layers(None, HashMap::new(), &[])
    }

    /// Reads file and environment of this process, and puts `flags` (`("server.bind", "0.0.0.0:80")`) on top.
    ///
    /// # Errors
    /// Unknown keys, wrong types, values out of range.
    pub fn load(file: Option<&Path>, flags: &[(&str, String)]) -> Result<Self, ConfigError> {
        Self::from_layers(file, std::env::vars().collect(), flags)
    }

    /// [`Config::load`] with the environment given.
    ///
    /// # Errors
    /// Unknown keys, wrong types, values out of range.
    pub fn from_layers(
        file: Option<&Path>,
        environment: HashMap<String, String>,
        flags: &[(&str, String)],
    ) -> Result<Self, ConfigError> {
        // Only names with the double underscore are settings: LORAD_ORACLE_PYTHON and the like belong to tools.
        let environment = environment
            .into_iter()
            .filter(|(name, _)| name.strip_prefix("LORAD_").is_some_and(|rest| rest.contains("__")))
            .collect();
        let mut source = Environment::with_prefix("LORAD")
            .prefix_separator("_")
            .separator("__")
            .try_parsing(true)
            .list_separator(",")
            .source(Some(environment));
        for list in LISTS {
            source = source.with_list_parse_key(list);
        }
        let mut layers = config::Config::builder().add_source(File::from_str(DEFAULTS, FileFormat::Toml));
        if let Some(file) = file {
            layers = layers.add_source(File::from(file).format(FileFormat::Toml).required(true));
        }
        layers = layers.add_source(source);
        for (key, value) in flags {
            layers = if LISTS.contains(key) {
                let items = value.split(',').filter(|item| !item.is_empty()).map(str::to_owned);
                layers.set_override(*key, items.collect::<Vec<_>>())?
            } else {
                layers.set_override(*key, value.as_str())?
            };
        }
        let config: Self = layers.build()?.try_deserialize()?;
        config.validate()?;
        Ok(config)
    }

    /// Limits of the retry policy.
    pub fn retry_limits(&self) -> RetryLimits {
        RetryLimits {
            max_failed_attempts: u32::try_from(self.scheduler.max_failed_attempts).unwrap_or(u32::MAX),
            backoff_ms: i64::try_from(self.scheduler.retry_backoff_ms).unwrap_or(i64::MAX),
            max_backoff_ms: 600_000,
        }
    }

    fn validate(&self) -> Result<(), ConfigError> {
        let mut faults = Vec::new();
        let mut range = |key: &str, value: u64, min: u64, max: u64| {
            if !(min..=max).contains(&value) {
                faults.push(format!("{key} = {value}: must be in {min}..={max}"));
            }
        };
        let (server, limits, scheduler) = (&self.server, &self.limits, &self.scheduler);
        range("server.request_timeout_ms", server.request_timeout_ms, 1000, 3_600_000);
        range("server.header_timeout_ms", server.header_timeout_ms, 1000, 600_000);
        range("server.audit_entries", server.audit_entries, 100, 100_000_000);
        range("server.session_hours", server.session_hours, 1, 8760);
        range("storage.min_free_bytes", self.storage.min_free_bytes, 0, 1 << 40);
        range("storage.ballast_bytes", self.storage.ballast_bytes, 0, 1 << 30);
        range("server.max_streams", server.max_streams, 1, 100_000);
        range("server.sse_ping_ms", server.sse_ping_ms, 1000, 60_000);
        range("server.shutdown_grace_ms", server.shutdown_grace_ms, 0, 600_000);
        range("storage.cache_bytes", self.storage.cache_bytes, 0, 1 << 50);
        range("limits.upload_bytes", limits.upload_bytes, 1024, 1 << 40);
        range("limits.json_bytes", limits.json_bytes, 1024, 100 << 20);
        range("limits.archive_entries", limits.archive_entries, 1, 10_000_000);
        range(
            "limits.archive_unpacked_bytes",
            limits.archive_unpacked_bytes,
            1024,
            1 << 43,
        );
        range("limits.archive_ratio", limits.archive_ratio, 2, 10_000);
        range("limits.image_pixels", limits.image_pixels, 1, 1 << 26);
        range("limits.caption_chars", limits.caption_chars, 1, 1_000_000);
        range(
            "limits.requests_per_minute",
            limits.requests_per_minute.into(),
            0,
            1_000_000,
        );
        range("limits.queued_jobs", limits.queued_jobs, 1, 1_000_000);
        range("scheduler.threads", scheduler.threads, 0, 1024);
        range("scheduler.nice", scheduler.nice, 0, 19);
        range("scheduler.tick_ms", scheduler.tick_ms, 50, 60_000);
        range("scheduler.lease_ms", scheduler.lease_ms, 2000, 3_600_000);
        range("scheduler.lease_grace_ms", scheduler.lease_grace_ms, 0, 600_000);
        range("scheduler.heartbeat_ms", scheduler.heartbeat_ms, 100, 60_000);
        range("scheduler.adopt_window_ms", scheduler.adopt_window_ms, 0, 3_600_000);
        range("scheduler.kill_grace_ms", scheduler.kill_grace_ms, 0, 600_000);
        range(
            "scheduler.worker_memory_bytes",
            scheduler.worker_memory_bytes,
            0,
            1 << 50,
        );
        range("scheduler.max_failed_attempts", scheduler.max_failed_attempts, 1, 1000);
        range("scheduler.retry_backoff_ms", scheduler.retry_backoff_ms, 0, 600_000);
        let webhooks = &self.webhooks;
        range("webhooks.timeout_ms", webhooks.timeout_ms, 100, 300_000);
        for pause in &webhooks.retry_after_ms {
            range("webhooks.retry_after_ms", *pause, 0, 604_800_000);
        }
        range("webhooks.disable_after_days", webhooks.disable_after_days, 1, 365);
        range("webhooks.keep_days", webhooks.keep_days, 1, 3650);
        range("webhooks.poll_ms", webhooks.poll_ms, 10, 3_600_000);
        if scheduler.lease_ms < scheduler.heartbeat_ms.saturating_mul(2) {
            faults.push("scheduler.lease_ms: must be at least two scheduler.heartbeat_ms".to_owned());
        }
        if scheduler.devices.is_empty() {
            faults.push("scheduler.devices: at least one, e.g. \"cpu\"".to_owned());
        }
        for (i, device) in scheduler.devices.iter().enumerate() {
            let known = device == "cpu"
                || ["cuda:", "metal:"]
                    .iter()
                    .any(|kind| device.strip_prefix(kind).is_some_and(|n| n.parse::<u16>().is_ok()));
            if !known {
                faults.push(format!("scheduler.devices: {device:?} is none of cpu, cuda:N, metal:N"));
            }
            if scheduler.devices[..i].contains(device) {
                faults.push(format!("scheduler.devices: {device:?} is listed twice"));
            }
        }
        if let Err(error) = self.log.filter.parse::<tracing_subscriber::EnvFilter>() {
            faults.push(format!("log.filter: {error}"));
        }
        let endpoint = self.traces.otlp_endpoint.as_str();
        if !matches!(endpoint, "" | "off") && !is_http_address(endpoint) {
            faults.push(format!(
                "traces.otlp_endpoint: {endpoint:?} is no address that begins with http:// or https://"
            ));
        }
        if faults.is_empty() {
            Ok(())
        } else {
            Err(ConfigError::Invalid(faults))
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn env(pairs: &[(&str, &str)]) -> HashMap<String, String> {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    #[test]
    fn the_defaults_are_valid_and_complete() {
        let config = Config::defaults().unwrap();
        assert_eq!(config.server.bind.port(), 8080);
        assert_eq!(config.scheduler.devices, ["cpu"]);
    }

    #[test]
    fn each_layer_wins_over_the_one_before() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("lorad.toml");
        std::fs::write(
            &file,
            "[scheduler]\nlease_ms = 10000\nheartbeat_ms = 1000\ntick_ms = 100\n",
        )
        .unwrap();
        let environment = env(&[
            ("LORAD_SCHEDULER__HEARTBEAT_MS", "2000"),
            ("LORAD_SCHEDULER__TICK_MS", "200"),
            ("LORAD_SCHEDULER__DEVICES", "cpu,cuda:0"),
            ("LORAD_ORACLE_PYTHON", "/usr/bin/python3"),
        ]);
        let flags = [("scheduler.tick_ms", "300".to_owned())];
        let config = Config::from_layers(Some(&file), environment, &flags).unwrap();
        assert_eq!(
            (
                config.scheduler.lease_ms,
                config.scheduler.heartbeat_ms,
                config.scheduler.tick_ms
            ),
            (10_000, 2000, 300)
        );
        assert_eq!(config.scheduler.devices, ["cpu", "cuda:0"]);
    }

    #[test]
    fn a_list_of_one_or_more_comes_from_every_layer() {
        for (text, wanted) in [("100", vec![100]), ("100,200", vec![100, 200])] {
            let from_environment = Config::from_layers(None, env(&[("LORAD_WEBHOOKS__RETRY_AFTER_MS", text)]), &[]);
            assert_eq!(from_environment.unwrap().webhooks.retry_after_ms, wanted);
            let flags = [("webhooks.retry_after_ms", text.to_owned())];
            let from_flags = Config::from_layers(None, HashMap::new(), &flags);
            assert_eq!(from_flags.unwrap().webhooks.retry_after_ms, wanted);
        }
        let flags = [("webhooks.allow_private", "10.0.0.0/8,localhost".to_owned())];
        let error = Config::from_layers(None, HashMap::new(), &flags).unwrap_err();
        assert!(error.to_string().contains("localhost"), "{error}");
    }

    #[test]
    fn a_misspelt_key_is_refused_by_name_in_every_layer() {
        let message = |result: Result<Config, ConfigError>| result.unwrap_err().to_string();
        let environment = env(&[("LORAD_SERVER__BINDD", "127.0.0.1:1")]);
        assert!(message(Config::from_layers(None, environment, &[])).contains("bindd"));
        let flags = [("servr.bind", "127.0.0.1:1".to_owned())];
        assert!(message(Config::from_layers(None, HashMap::new(), &flags)).contains("servr"));
    }

    #[test]
    fn all_values_out_of_range_are_named_at_once() {
        let flags = [
            ("scheduler.nice", "20".to_owned()),
            ("scheduler.devices", "gpu,gpu".to_owned()),
            ("traces.otlp_endpoint", "localhost:4318".to_owned()),
        ];
        let text = Config::from_layers(None, HashMap::new(), &flags)
            .unwrap_err()
            .to_string();
        for part in [
            "scheduler.nice = 20",
            "\"gpu\" is none of",
            "listed twice",
            "\"localhost:4318\" is no address",
        ] {
            assert!(text.contains(part), "{part} is missing in {text}");
        }
    }

    #[test]
    fn every_key_of_the_defaults_is_explained() {
        let lines: Vec<&str> = DEFAULTS.lines().collect();
        for (i, line) in lines.iter().enumerate() {
            if line.contains(" = ") && !line.starts_with('#') {
                assert!(lines[i - 1].starts_with('#'), "no comment above {line}");
            }
        }
    }
}
