//! `lorad train`: one job without a server. The same ingest, validation, trainer and result files as the server's, with a
//! progress bar in place of the queue.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use anyhow::{Context, Result, bail};
use lorad::{
    domain::estimate,
    executor::KEEP_FREED_MEMORY,
    ingest::{self, IngestError, Limits, Source, inspect::ChildInspector},
    trainer::{Reporter, TrainerCatalog, run_attempt},
};
use lorad_proto::{
    PROTOCOL_VERSION,
    catalog::{BaseModelInfo, Catalog},
    command::Command,
    event::{Level, Results, StepMetrics, WorkerEvent},
    problem::Problem,
    spec::{AttemptSpec, BaseModelRef, Cache, DatasetRef, Export, Sampling},
};
use serde_json::{Map, Value};

use super::{Exit, args::Train, models, print_problem_details, progress::Progress, runtime, tables::size};

/// Runs the command.
pub(crate) fn run(args: &Train) -> Result<Exit> {
    #[cfg(unix)]
    start_again_for_the_allocator();
    let (base_id, base_dir) = models::locate(&args.base, &args.settings)?;
    let base = TrainerCatalog.inspect_base(&base_dir)?;
    let given = given(&args.set)?;
    let mut hyperparameters = resolve(&base, &given)?;
    let init_adapter = match &args.init_adapter {
        Some(file) => {
            let file = file
                .canonicalize()
                .with_context(|| format!("find {}", file.display()))?;
            TrainerCatalog.adopt_adapter(&base.family, &base_dir, &file, &given, &mut hyperparameters)?;
            Some(file)
        }
        None => None,
    };

    fs::create_dir_all(&args.out).with_context(|| format!("create {}", args.out.display()))?;
    let out = args
        .out
        .canonicalize()
        .with_context(|| format!("find {}", args.out.display()))?;
    // Inside `out`, so that moving the results is a rename; gone at the end, whatever the end is.
    let work = tempfile::Builder::new()
        .prefix(".lorad-")
        .tempdir_in(&out)
        .context("make a working folder")?;
    let dataset = work.path().join("dataset");
    let n_items = prepare_data(&args.data, work.path(), &dataset)?;

    let sampling = Sampling {
        prompts: args.prompt.clone(),
        every_steps: args.sample_every,
        seed: args.sample_seed,
        ..Sampling::default()
    };
    let plan = TrainerCatalog.plan(&base.family, &base_dir, &base, &hyperparameters, &sampling, &dataset)?;
    for warning in &plan.warnings {
        eprintln!("warning: {warning}");
    }
    eprintln!(
        "{n_items} pictures, {} steps, {} trainable parameters, about {} of memory and {:.1} minutes",
        plan.total_steps,
        plan.trainable_params,
        size(plan.memory_bytes),
        plan.duration_s() / 60.0
    );
    if args.device == "cpu" {
        estimate::fits(&plan, TrainerCatalog.memory().map(|memory| memory.total_bytes))?;
    }
    if args.dry_run {
        let plan = serde_json::json!({ "base": base, "hyperparameters": hyperparameters, "plan": plan });
        println!("{}", serde_json::to_string_pretty(&plan)?);
        return Ok(Exit::Ok);
    }

    let attempt_dir = work.path().join("attempt");
    for folder in ["checkpoints", "samples", "results"] {
        fs::create_dir_all(attempt_dir.join(folder)).context("make a working folder")?;
    }
    let spec = AttemptSpec {
        protocol: PROTOCOL_VERSION,
        job_id: "job_local".to_owned(),
        job_name: args.name.clone().unwrap_or_else(|| name_of(&args.data)),
        attempt: 1,
        family: base.family.clone(),
        base_model: BaseModelRef {
            id: base_id,
            path: base_dir,
        },
        dataset: DatasetRef {
            id: "ds_local".to_owned(),
            path: dataset,
        },
        hyperparameters,
        sampling,
        export: Export {
            merged_pipeline: args.merged_pipeline,
        },
        device: args.device.clone(),
        threads: None,
        cache: Cache {
            dir: Some(args.cache.clone().unwrap_or_else(|| out.join("cache"))),
            max_bytes: super::config::load(&args.settings, &[])?.storage.cache_bytes,
        },
        attempt_dir: attempt_dir.clone(),
        init_adapter,
        resume_from: None,
        after_out_of_memory: false,
    };
    let metrics = match &args.metrics {
        Some(path) => Some(fs::File::create(path).with_context(|| format!("create {}", path.display()))?),
        None => None,
    };
    finish(train(spec, metrics)?, &attempt_dir, &out)
}

/// Replaces this process by the same command with the allocator's setting in its environment, where it is not yet: trainers that
/// the server starts get it from their executor. If that fails, training is merely slower.
#[cfg(unix)]
fn start_again_for_the_allocator() {
    use std::os::unix::process::CommandExt;

    let (name, value) = KEEP_FREED_MEMORY;
    if std::env::var_os(name).is_some() {
        return;
    }
    if let Ok(program) = std::env::current_exe() {
        let mut command = std::process::Command::new(program);
        // Returns only if it fails.
        let error = command.args(std::env::args_os().skip(1)).env(name, value).exec();
        tracing::debug!(%error, "could not start again with {name}");
    }
}

/// What `--set` says.
fn given(set: &[(String, Value)]) -> Result<Map<String, Value>> {
    let mut given = Map::new();
    for (name, value) in set {
        if given.insert(name.clone(), value.clone()).is_some() {
            bail!("--set {name} is given twice");
        }
    }
    Ok(given)
}

/// Defaults filled in, every wrong option named.
fn resolve(base: &BaseModelInfo, given: &Map<String, Value>) -> Result<Map<String, Value>> {
    TrainerCatalog.resolve(&base.family, base, given).map_err(|errors| {
        Problem::new(
            "hyperparameters.invalid",
            "Some options are wrong",
            format!("{} of --set cannot be used", errors.len()),
        )
        .with_hint(format!("`lorad families {}` lists them.", base.family))
        .with_errors(errors)
        .into()
    })
}

/// Ingests the data like an upload; returns the number of items.
fn prepare_data(data: &Path, work: &Path, dataset: &Path) -> Result<u32> {
    let staging = work.join("staging");
    fs::create_dir_all(&staging).context("make a working folder")?;
    let source = if data.is_dir() {
        Source::Folder(data)
    } else {
        Source::Archive(data)
    };
    let inspector = ChildInspector::new(std::env::current_exe().context("find this program")?);
    match ingest::ingest(source, &staging, dataset, &Limits::default(), &inspector) {
        Ok(ingested) => Ok(ingested.report.n_items),
        Err(IngestError::Refused(refusal)) => Err(refusal.problem.into()),
        Err(error) => Err(error).with_context(|| format!("read {}", data.display())),
    }
}

fn name_of(data: &Path) -> String {
    let stem = data.file_stem().unwrap_or(data.as_os_str()).to_string_lossy();
    stem.strip_suffix(".tar").unwrap_or(&stem).to_owned()
}

/// Shows events and passes Ctrl-C on.
struct Terminal {
    progress: Mutex<Progress>,
    metrics: Mutex<Option<fs::File>>,
    stop: AtomicBool,
}

impl Terminal {
    /// A figure that cannot be written (the disk is full) must not cost the run: it is told once, and no more are written.
    fn write_metrics(&self, step: &StepMetrics) {
        let mut file = self.metrics.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(open) = file.as_mut() {
            let written = serde_json::to_vec(step)
                .map_err(std::io::Error::from)
                .and_then(|mut line| {
                    line.push(b'\n');
                    open.write_all(&line)
                });
            if let Err(error) = written {
                eprintln!("warning: figures are no longer written: {error}");
                *file = None;
            }
        }
    }
}

impl Reporter for Terminal {
    fn emit(&self, event: WorkerEvent) {
        if let WorkerEvent::Step(step) = &event {
            self.write_metrics(step);
        }
        let mut progress = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
        match event {
            WorkerEvent::Phase { phase, done, total } => progress.phase(phase, done, total),
            WorkerEvent::Step(m) => progress.step(m.step, m.total_steps, m.loss, 1000.0 / m.step_ms.max(0.001)),
            WorkerEvent::Log { level, message } if level >= Level::Warn => progress.note(&message),
            WorkerEvent::Alert { code, detail, .. } => progress.note(&format!("{code}: {detail}")),
            _ => {}
        }
    }

    fn command(&self) -> Command {
        if self.stop.load(Ordering::Relaxed) {
            Command::Cancel { save: true }
        } else {
            Command::None
        }
    }
}

/// Trains on a thread of its own while this one waits for Ctrl-C.
fn train(spec: AttemptSpec, metrics: Option<fs::File>) -> Result<WorkerEvent> {
    let terminal = Arc::new(Terminal {
        progress: Mutex::new(Progress::new()),
        metrics: Mutex::new(metrics),
        stop: AtomicBool::new(false),
    });
    let reporter: Arc<dyn Reporter> = terminal.clone();
    let last = runtime()?.block_on(async {
        let mut attempt = tokio::task::spawn_blocking(move || run_attempt(spec, reporter));
        loop {
            tokio::select! {
                event = &mut attempt => return event.context("the training thread ended without an answer"),
                signal = tokio::signal::ctrl_c() => {
                    signal.context("wait for Ctrl-C")?;
                    if terminal.stop.swap(true, Ordering::Relaxed) {
                        std::process::exit(130);
                    }
                    let progress = terminal.progress.lock().unwrap_or_else(PoisonError::into_inner);
                    progress.note("stopping after this step; what has been trained is saved (Ctrl-C again: stop at once)");
                }
            }
        }
    });
    terminal
        .progress
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .finish();
    last
}

/// Moves what was made out of the working folder and says how it went.
fn finish(last: WorkerEvent, attempt_dir: &Path, out: &Path) -> Result<Exit> {
    match last {
        WorkerEvent::Done { results } => {
            keep(&results, attempt_dir, out)?;
            Ok(Exit::Ok)
        }
        WorkerEvent::Stopped { step, results, .. } => {
            eprintln!("stopped after step {step}");
            if let Some(results) = results {
                keep(&results, attempt_dir, out)?;
            }
            Ok(Exit::Cancelled)
        }
        WorkerEvent::Failed { problem } => {
            eprintln!("the job failed: {problem} ({})", problem.code);
            print_problem_details(&problem);
            Ok(Exit::JobFailed)
        }
        other => bail!("the trainer ended with an event that ends nothing: {other:?}"),
    }
}

fn keep(results: &Results, attempt_dir: &Path, out: &Path) -> Result<()> {
    for file in &results.files {
        let to = out.join(&file.name);
        rename(&attempt_dir.join("results").join(&file.name), &to)?;
        println!("{}", to.display());
        eprintln!("  {}  sha256 {}", size(file.bytes), file.sha256);
    }
    let samples = out.join("samples");
    for entry in fs::read_dir(attempt_dir.join("samples")).context("list the sample pictures")? {
        let entry = entry?;
        fs::create_dir_all(&samples).with_context(|| format!("create {}", samples.display()))?;
        rename(&entry.path(), &samples.join(entry.file_name()))?;
    }
    for (name, value) in &results.summary {
        eprintln!("{name}: {value}");
    }
    Ok(())
}

fn rename(from: &Path, to: &PathBuf) -> Result<()> {
    fs::rename(from, to).with_context(|| format!("move {} to {}", from.display(), to.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_adapter_is_named_after_its_data() {
        assert_eq!(name_of(Path::new("a/my-cats.tar.gz")), "my-cats");
        assert_eq!(name_of(Path::new("a/my-cats.zip")), "my-cats");
        assert_eq!(name_of(Path::new("a/my-cats")), "my-cats");
    }
}
