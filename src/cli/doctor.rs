//! `lorad doctor`: what this machine offers, and what to fix before a job meets it.

use std::{fs, path::Path};

use anyhow::Result;
use lorad::trainer::TrainerCatalog;
use lorad_proto::{PROTOCOL_VERSION, catalog::Catalog};
use serde::Serialize;

use super::{
    Exit,
    args::Doctor,
    config, models,
    tables::{size, table},
};

/// Free space below which a job may fail to write its checkpoints.
const LOW_DISK_BYTES: u64 = 2 << 30;
/// Free memory below which even the bundled base is tight.
const LOW_MEMORY_BYTES: u64 = 1 << 30;
/// Open files below which uploads and streams run short.
const LOW_OPEN_FILES: u64 = 1024;

#[derive(Debug, Serialize)]
struct Report {
    version: &'static str,
    protocol: u32,
    build: Build,
    machine: Machine,
    devices: Vec<String>,
    base_models: Vec<models::Found>,
    checks: Vec<Check>,
}

#[derive(Debug, Serialize)]
struct Build {
    features: Vec<&'static str>,
    allocator: &'static str,
    sqlite: String,
    target: String,
}

#[derive(Debug, Serialize)]
struct Machine {
    cores: usize,
    memory_bytes: u64,
    memory_available_bytes: u64,
    data_dir: String,
    disk_free_bytes: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Status {
    Ok,
    Warning,
    Failed,
}

#[derive(Debug, Serialize)]
struct Check {
    name: &'static str,
    status: Status,
    detail: String,
    #[serde(skip_serializing_if = "str::is_empty")]
    hint: &'static str,
}

impl Check {
    /// Fine, or else the given status and hint.
    fn new(name: &'static str, fine: bool, otherwise: Status, detail: impl Into<String>, hint: &'static str) -> Self {
        Self {
            name,
            status: if fine { Status::Ok } else { otherwise },
            detail: detail.into(),
            hint: if fine { "" } else { hint },
        }
    }
}

/// Runs the command: exit code 1 if a check failed.
pub(crate) fn run(args: &Doctor) -> Result<Exit> {
    let config = config::load(&args.settings, &[])?;
    let report = examine(&config.storage.data_dir, models::find(&config)?);
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print(&report);
    }
    let failed = report.checks.iter().any(|check| check.status == Status::Failed);
    Ok(if failed { Exit::Error } else { Exit::Ok })
}

fn examine(data_dir: &Path, base_models: Vec<models::Found>) -> Report {
    let (total, available) = memory();
    let machine = Machine {
        cores: std::thread::available_parallelism().map_or(1, usize::from),
        memory_bytes: total,
        memory_available_bytes: available,
        data_dir: data_dir.display().to_string(),
        disk_free_bytes: disk_free(data_dir),
    };
    let checks = checks(&machine, data_dir, &base_models);
    Report {
        version: env!("CARGO_PKG_VERSION"),
        protocol: PROTOCOL_VERSION,
        build: Build {
            features: features(),
            allocator: "mimalloc",
            sqlite: libsqlite3_sys::SQLITE_VERSION.to_string_lossy().into_owned(),
            target: format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS),
        },
        machine,
        devices: devices(),
        base_models,
        checks,
    }
}

/// Total and free bytes; a container's limit, where there is one, is the memory that counts. Zeros where the system does not say.
fn memory() -> (u64, u64) {
    let Ok(mut system) = sysinfo::System::new() else {
        return (0, 0);
    };
    system.refresh_memory();
    let (total, free) = (system.total_memory(), system.available_memory());
    match system.cgroup_limits() {
        Some(limits) => (limits.total_memory.min(total), limits.free_memory.min(free)),
        None => (total, free),
    }
}

fn features() -> Vec<&'static str> {
    let all = [
        ("train", cfg!(feature = "train")),
        ("cuda", cfg!(feature = "cuda")),
        ("cudnn", cfg!(feature = "cudnn")),
        ("metal", cfg!(feature = "metal")),
        ("mkl", cfg!(feature = "mkl")),
    ];
    all.into_iter().filter(|(_, on)| *on).map(|(name, _)| name).collect()
}

/// What jobs can run on, by the names that a job's `device` takes.
fn devices() -> Vec<String> {
    let mut devices = vec!["cpu".to_owned()];
    if cfg!(feature = "cuda") {
        devices.extend((0..nvidia_gpus()).map(|index| format!("cuda:{index}")));
    }
    if cfg!(feature = "metal") {
        devices.push("metal:0".to_owned());
    }
    devices
}

/// NVIDIA GPUs that the kernel driver has found.
fn nvidia_gpus() -> usize {
    fs::read_dir("/proc/driver/nvidia/gpus").map_or(0, Iterator::count)
}

fn checks(machine: &Machine, data_dir: &Path, base_models: &[models::Found]) -> Vec<Check> {
    let unusable: Vec<_> = base_models
        .iter()
        .filter_map(|m| m.problem.as_ref().map(|p| format!("{}: {}", m.id, p.detail)))
        .collect();
    let families = TrainerCatalog.families().len();
    let gpus = nvidia_gpus();
    let mut checks = vec![
        Check::new(
            "trainer",
            families > 0,
            Status::Failed,
            format!("{families} model families in this build"),
            "This binary was built without the feature `train`; use one built with default features.",
        ),
        writable(data_dir),
        Check::new(
            "memory",
            machine.memory_available_bytes >= LOW_MEMORY_BYTES,
            Status::Warning,
            format!(
                "{} of {} free",
                size(machine.memory_available_bytes),
                size(machine.memory_bytes)
            ),
            "Close other programs, or train with a smaller batch and gradient accumulation.",
        ),
        Check::new(
            "gpu",
            gpus == 0 || cfg!(feature = "cuda"),
            Status::Warning,
            format!("{gpus} NVIDIA GPUs"),
            "This build cannot use them; build with `--features cuda`.",
        ),
        Check::new(
            "base models",
            unusable.is_empty() && !base_models.is_empty(),
            Status::Failed,
            if unusable.is_empty() {
                format!("{} can be trained", base_models.len())
            } else {
                unusable.join("; ")
            },
            "Repair or remove the folder; it must be a complete diffusers pipeline with safetensors weights.",
        ),
    ];
    if let Some(free) = machine.disk_free_bytes {
        checks.push(Check::new(
            "disk",
            free >= LOW_DISK_BYTES,
            Status::Warning,
            format!("{} free for {}", size(free), data_dir.display()),
            "Checkpoints and results need room; delete old jobs or choose another --data-dir.",
        ));
    }
    if let Some(limit) = rustix::process::getrlimit(rustix::process::Resource::Nofile).current {
        checks.push(Check::new(
            "open files",
            limit >= LOW_OPEN_FILES,
            Status::Warning,
            format!("up to {limit}"),
            "Raise the limit, e.g. `ulimit -n 4096`.",
        ));
    }
    let confined = lorad::ingest::sandbox::available();
    let has = |it: bool| if it { "yes" } else { "no" };
    checks.push(Check::new(
        "sandbox",
        confined.files && confined.calls,
        Status::Warning,
        format!(
            "Landlock {}, system call filter {}",
            has(confined.files),
            has(confined.calls)
        ),
        "Uploaded pictures are decoded under limits, but this kernel (Linux 5.13 or newer has Landlock) lets their decoder read \
         what this user can read.",
    ));
    #[cfg(target_arch = "x86_64")]
    checks.push(Check::new(
        "cpu",
        std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("fma"),
        Status::Warning,
        format!(
            "{} cores, AVX2 {}",
            machine.cores,
            yes(std::is_x86_feature_detected!("avx2"))
        ),
        "Without AVX2 and FMA training on the CPU is several times slower.",
    ));
    checks
}

#[cfg(target_arch = "x86_64")]
fn yes(it: bool) -> &'static str {
    if it { "yes" } else { "no" }
}

/// Whether the data folder (or the nearest existing one above it, where it would be made) can be written.
fn writable(data_dir: &Path) -> Check {
    let existing = nearest(data_dir);
    let probe = tempfile::Builder::new().prefix(".lorad-doctor-").tempfile_in(existing);
    Check::new(
        "data folder",
        probe.is_ok(),
        Status::Failed,
        match &probe {
            Ok(_) => format!("{} can be written", data_dir.display()),
            Err(error) => format!("{}: {error}", existing.display()),
        },
        "Choose another folder with --data-dir, or give this user the right to write there.",
    )
}

/// The folder itself, or the nearest existing path above it.
fn nearest(data_dir: &Path) -> &Path {
    data_dir
        .ancestors()
        .find(|path| path.exists())
        .unwrap_or(Path::new("."))
}

fn disk_free(data_dir: &Path) -> Option<u64> {
    let stat = rustix::fs::statvfs(nearest(data_dir)).ok()?;
    Some(stat.f_bavail.saturating_mul(stat.f_frsize))
}

fn print(report: &Report) {
    let m = &report.machine;
    println!(
        "lorad {} ({}, features: {})",
        report.version,
        report.build.target,
        report.build.features.join(", ")
    );
    println!(
        "sqlite {}, {} allocator, worker protocol {}",
        report.build.sqlite, report.build.allocator, report.protocol
    );
    println!(
        "{} cores, {} memory, devices: {}",
        m.cores,
        size(m.memory_bytes),
        report.devices.join(", ")
    );
    println!();
    let rows = report.checks.iter().map(|check| {
        let mark = match check.status {
            Status::Ok => "ok",
            Status::Warning => "warning",
            Status::Failed => "FAILED",
        };
        vec![mark.to_owned(), check.name.to_owned(), check.detail.clone()]
    });
    println!("{}", table(&rows.collect::<Vec<_>>()));
    for check in report.checks.iter().filter(|check| !check.hint.is_empty()) {
        eprintln!("hint ({}): {}", check.name, check.hint);
    }
    println!("\n{}", models::listing(&report.base_models));
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn machine(memory: u64, disk: u64) -> Machine {
        Machine {
            cores: 2,
            memory_bytes: memory,
            memory_available_bytes: memory,
            data_dir: String::new(),
            disk_free_bytes: Some(disk),
        }
    }

    fn status(checks: &[Check], name: &str) -> Status {
        checks.iter().find(|check| check.name == name).unwrap().status
    }

    #[test]
    fn a_short_disk_and_little_memory_are_warned_of_with_a_hint() {
        let dir = tempfile::tempdir().unwrap();
        let found = checks(&machine(1 << 20, 1 << 20), dir.path(), &[]);
        assert_eq!(status(&found, "memory"), Status::Warning);
        assert_eq!(status(&found, "disk"), Status::Warning);
        assert!(
            found
                .iter()
                .all(|check| check.status == Status::Ok || !check.hint.is_empty())
        );
        let found = checks(&machine(64 << 30, 1 << 40), dir.path(), &[]);
        assert_eq!(status(&found, "memory"), Status::Ok);
        assert_eq!(status(&found, "disk"), Status::Ok);
    }

    #[test]
    fn a_data_folder_that_cannot_be_made_fails() {
        let file = tempfile::NamedTempFile::new().unwrap();
        // Below a file no folder can be made, whoever asks.
        let check = writable(&file.path().join("data"));
        assert_eq!(check.status, Status::Failed);
    }
}
