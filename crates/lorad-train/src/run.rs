//! The training loop. The only one: families give a [`Task`], and this drives it.
//!
//! [`attempt`] reads from top to bottom: open, resume, check the gradients, draw the base model's pictures, take the
//! steps, draw again, export.

use std::{
    fs,
    path::PathBuf,
    sync::Once,
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use lorad_proto::{
    PROTOCOL_VERSION,
    command::Command,
    event::{Level, Phase, Results, Sample, StepMetrics, StopReason, WorkerEvent},
    problem::Problem,
    spec::AttemptSpec,
};
use serde::Deserialize;
use serde_json::{Map, json};
use sha2::{Digest, Sha256};

use crate::{
    Result, TrainError,
    checkpoint::{self, Snapshot},
    data::Order,
    device,
    optim::{
        AdamWConfig,
        schedule::{LrScheduler, learning_rate},
    },
    selfcheck,
    state::TrainState,
    step::{StepConfig, Stepper},
    task::{ExportContext, Family, Prompt, Reporter, Task},
};

/// The hyperparameters that the loop itself reads; a family may have more.
#[derive(Debug, Clone, Deserialize)]
struct LoopSettings {
    max_train_steps: Option<u64>,
    num_epochs: Option<u64>,
    batch_size: usize,
    gradient_accumulation_steps: usize,
    learning_rate: f64,
    lr_scheduler: LrScheduler,
    lr_warmup_steps: u64,
    adam_beta1: f64,
    adam_beta2: f64,
    adam_epsilon: f64,
    weight_decay: f64,
    l2_lambda: f64,
    max_grad_norm: f64,
    seed: u64,
    checkpoint_every_steps: u64,
    keep_checkpoints: usize,
}

/// Runs one attempt at a job and returns its final event: `Done`, `Failed` or `Stopped`. `Hello` and the final event are
/// the caller's to send.
pub fn run_attempt(family: &dyn Family, spec: &AttemptSpec, reporter: &dyn Reporter) -> WorkerEvent {
    let mut step = 0;
    match attempt(family, spec, reporter, &mut step) {
        Ok(event) => event,
        Err(TrainError::Stopped(reason)) => WorkerEvent::Stopped {
            step,
            reason,
            results: None,
        },
        Err(e) => WorkerEvent::Failed {
            problem: e.into_problem(),
        },
    }
}

/// `reached` follows the steps completed, for the event of an attempt that is stopped between step boundaries.
fn attempt(family: &dyn Family, spec: &AttemptSpec, reporter: &dyn Reporter, reached: &mut u64) -> Result<WorkerEvent> {
    // --- open ---
    if spec.protocol != PROTOCOL_VERSION {
        return Err(Problem::new(
            "worker.protocol",
            "Server and worker do not fit",
            format!(
                "The job speaks protocol {}, this worker {PROTOCOL_VERSION}.",
                spec.protocol
            ),
        )
        .with_hint("Use the same lorad version for the server and its workers.")
        .into());
    }
    use_threads(spec.threads);
    let settings: LoopSettings = serde_json::from_value(spec.hyperparameters.clone().into()).map_err(|e| {
        Problem::new(
            "spec.unresolved",
            "The job's settings are incomplete",
            format!("hyperparameters: {e}"),
        )
    })?;
    let device = device::open(&spec.device)?;
    reporter.phase(Phase::Loading, 0, 1);
    let task = family.open(spec, &device, reporter)?;
    let task = task.as_ref();
    reporter.check_stop()?;

    // --- resume ---
    checkpoint::sweep(&spec.attempt_dir.join("checkpoints"))?;
    let mut run = Run::new(spec, settings, task, reporter)?;
    if let Some(dir) = &spec.resume_from {
        run.resume(dir)?;
        *reached = run.state.step;
    }
    let order = Order::new(
        run.settings.seed,
        task.n_items(),
        run.settings.batch_size,
        run.settings.gradient_accumulation_steps,
    );
    let total_steps = match (run.settings.max_train_steps, run.settings.num_epochs) {
        (Some(steps), _) => steps,
        (None, epochs) => epochs.unwrap_or(1).saturating_mul(order.steps_per_epoch()),
    };

    // --- check that the gradients point where the loss falls ---
    reporter.phase(Phase::CheckingGradients, 0, 1);
    let check = selfcheck::directional_derivative(task, &order.window(1, 0).micro_batches[0])?;
    reporter.log(Level::Info, &check.to_string());
    reporter.phase(Phase::CheckingGradients, 1, 1);
    reporter.check_stop()?;

    // --- the base model's pictures ---
    if run.state.step == 0 {
        run.draw(0, false)?;
    }

    // --- train ---
    while run.state.step < total_steps {
        if let Some(stopped) = run.obey(reporter.command())? {
            return Ok(stopped);
        }
        let started = Instant::now();
        let step = run.state.step + 1;
        let lr = learning_rate(
            run.settings.lr_scheduler,
            run.settings.learning_rate,
            run.settings.lr_warmup_steps,
            total_steps,
            step,
        );
        let window = order.window(step, run.state.cursor);
        let n_samples = window.n_samples;
        let losses = window
            .micro_batches
            .iter()
            .map(|batch| Ok((task.loss(batch)?, batch.items.len() as f64 / n_samples as f64)));
        let outcome = run.stepper.step(lr, losses)?;
        let elapsed = started.elapsed();
        run.state.train_ms += u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX);
        let finite = |v: f64| v.is_finite().then_some(v);
        if outcome.applied {
            run.state.step = step;
            *reached = step;
            run.state.cursor += n_samples as u64;
            run.state.last_loss = finite(outcome.loss);
        }
        reporter.emit(WorkerEvent::Step(StepMetrics {
            step,
            total_steps,
            epoch: order.epoch(run.state.cursor),
            loss: finite(outcome.loss),
            lr,
            grad_norm: finite(outcome.grad_norm),
            step_ms: elapsed.as_secs_f64() * 1e3,
            samples_per_s: n_samples as f64 / elapsed.as_secs_f64(),
            extra: if run.settings.l2_lambda > 0.0 {
                [("l2_penalty".to_owned(), outcome.l2_penalty)].into()
            } else {
                Default::default()
            },
        }));
        if !outcome.applied {
            return Err(run.not_finite(step, lr)?);
        }
        let due = |every: u64| every > 0 && step.is_multiple_of(every);
        if due(run.settings.checkpoint_every_steps) {
            run.save()?;
        }
        if due(spec.sampling.every_steps) && step < total_steps {
            run.draw(step, true)?;
        }
    }

    // --- the adapter's pictures, and the files ---
    run.draw(run.state.step, true)?;
    let results = run.export(&order)?;
    Ok(WorkerEvent::Done { results })
}

/// Fixes the number of threads of CPU kernels, once per process: results are byte-identical only for the same number.
fn use_threads(threads: Option<usize>) {
    static ONCE: Once = Once::new();
    if let Some(n) = threads {
        // Fails only if the pool is already running, with the number it was made with.
        ONCE.call_once(|| drop(rayon::ThreadPoolBuilder::new().num_threads(n).build_global()));
    }
}

/// An attempt under way.
struct Run<'a> {
    spec: &'a AttemptSpec,
    settings: LoopSettings,
    task: &'a dyn Task,
    reporter: &'a dyn Reporter,
    stepper: Stepper,
    state: TrainState,
    /// Newest served requests, so that a command that is told twice is obeyed once.
    served_checkpoint: u64,
    served_sample: u64,
    /// Step of the newest checkpoint.
    saved_at: Option<u64>,
}

impl<'a> Run<'a> {
    fn new(
        spec: &'a AttemptSpec,
        settings: LoopSettings,
        task: &'a dyn Task,
        reporter: &'a dyn Reporter,
    ) -> Result<Self> {
        let config = StepConfig {
            adamw: AdamWConfig {
                beta1: settings.adam_beta1,
                beta2: settings.adam_beta2,
                epsilon: settings.adam_epsilon,
                weight_decay: settings.weight_decay,
            },
            max_grad_norm: settings.max_grad_norm,
            l2_lambda: settings.l2_lambda,
        };
        let mut fingerprints = task.fingerprints();
        let text = serde_json::Value::from(spec.hyperparameters.clone()).to_string();
        fingerprints.insert("hyperparameters".to_owned(), hex::encode(Sha256::digest(text)));
        Ok(Self {
            stepper: Stepper::new(task.adapters(), config)?,
            state: TrainState {
                started_at_ms: now_ms(),
                fingerprints,
                ..TrainState::default()
            },
            spec,
            settings,
            task,
            reporter,
            served_checkpoint: 0,
            served_sample: 0,
            saved_at: None,
        })
    }

    fn checkpoints(&self) -> PathBuf {
        self.spec.attempt_dir.join("checkpoints")
    }

    /// Continues from a checkpoint of the same run.
    fn resume(&mut self, dir: &std::path::Path) -> Result<()> {
        let Snapshot {
            state,
            adapter,
            optimizer,
        } = checkpoint::read(dir)?;
        let differing: Vec<&str> = self
            .state
            .fingerprints
            .iter()
            .filter(|(name, value)| state.fingerprints.get(*name) != Some(value))
            .map(|(name, _)| name.as_str())
            .collect();
        if !differing.is_empty() {
            return Err(Problem::new(
                "checkpoint.other_run",
                "The checkpoint belongs to another run",
                format!("{} was made with a different {}.", dir.display(), differing.join(", ")),
            )
            .with_hint("Start the job anew, or restore the settings, base model and dataset that it was made with.")
            .into());
        }
        for (name, var) in self.task.adapters().named_vars() {
            let Some(tensor) = adapter.get(&name) else {
                return Err(Problem::new(
                    "checkpoint.damaged",
                    "The checkpoint is damaged",
                    format!("{} has no tensor {name}.", dir.display()),
                )
                .into());
            };
            var.set(&tensor.to_device(var.device())?)?;
        }
        self.stepper.optimizer.load_state(&optimizer, state.step)?;
        self.saved_at = Some(state.step);
        self.state = state;
        self.reporter
            .log(Level::Info, &format!("continuing after step {}", self.state.step));
        Ok(())
    }

    /// Writes a checkpoint, announces it, and deletes the oldest beyond the number to keep.
    fn save(&mut self) -> Result<()> {
        if self.saved_at == Some(self.state.step) {
            return Ok(());
        }
        // Copies: `Var::set` writes in place.
        let adapter = self
            .task
            .adapters()
            .named_vars()
            .into_iter()
            .map(|(name, var)| Ok((name, var.as_detached_tensor().copy()?)))
            .collect::<Result<_>>()?;
        let snapshot = Snapshot {
            state: self.state.clone(),
            adapter,
            optimizer: self.stepper.optimizer.state()?,
        };
        let root = self.checkpoints();
        let written = checkpoint::write(&root, &snapshot)?;
        self.saved_at = Some(self.state.step);
        self.reporter.emit(WorkerEvent::Checkpoint {
            step: self.state.step,
            dir: written.dir,
            bytes: written.bytes,
            sha256: written.sha256,
        });
        checkpoint::prune(&root, self.settings.keep_checkpoints)
    }

    /// Does what the server asks; a final event if that is to stop.
    fn obey(&mut self, command: Command) -> Result<Option<WorkerEvent>> {
        let stopped = |step, reason, results| Ok(Some(WorkerEvent::Stopped { step, reason, results }));
        let step = self.state.step;
        match command {
            Command::None => Ok(None),
            Command::Checkpoint { request } => {
                if request > self.served_checkpoint {
                    self.served_checkpoint = request;
                    self.save()?;
                }
                Ok(None)
            }
            Command::Sample { request } => {
                if request > self.served_sample {
                    self.served_sample = request;
                    self.draw(step, true)?;
                }
                Ok(None)
            }
            Command::Pause => {
                self.save()?;
                stopped(step, StopReason::Paused, None)
            }
            Command::Drain => {
                self.save()?;
                stopped(step, StopReason::Drained, None)
            }
            Command::Cancel { save } => {
                let results = if save && step > 0 {
                    let order = Order::new(self.settings.seed, self.task.n_items(), 1, 1);
                    Some(self.export(&order)?)
                } else {
                    None
                };
                stopped(step, StopReason::Cancelled, results)
            }
        }
    }

    /// Draws the job's prompts and announces the pictures.
    fn draw(&self, step: u64, with_adapter: bool) -> Result<()> {
        let sampling = &self.spec.sampling;
        if sampling.prompts.is_empty() {
            return Ok(());
        }
        let prompts: Vec<Prompt> = sampling
            .prompts
            .iter()
            .enumerate()
            .map(|(i, text)| Prompt {
                text: text.clone(),
                seed: sampling.seed.wrapping_add(i as u64),
            })
            .collect();
        let total = prompts.len() as u64;
        self.reporter.phase(Phase::Sampling, 0, total);
        let reporter = self.reporter;
        // Only a plain cancel interrupts drawing: everything else waits for the step boundary.
        let mut on_progress = || match reporter.command() {
            Command::Cancel { save: false } => Err(TrainError::Stopped(StopReason::Cancelled)),
            _ => Ok(()),
        };
        let pictures = self.task.sample(&prompts, sampling, with_adapter, &mut on_progress)?;
        let dir = self.spec.attempt_dir.join("samples");
        fs::create_dir_all(&dir).map_err(TrainError::io("create", &dir))?;
        for (i, (picture, prompt)) in pictures.iter().zip(prompts).enumerate() {
            let file = format!("{step:08}-{i:02}.png");
            let path = dir.join(&file);
            picture
                .save_with_format(&path, image::ImageFormat::Png)
                .map_err(|e| TrainError::io("write", &path)(std::io::Error::other(e)))?;
            let written = checkpoint::hash_file(&path).map_err(TrainError::io("read", &path))?;
            self.reporter.emit(WorkerEvent::Sample(Sample {
                step,
                prompt_index: i as u32,
                prompt: prompt.text,
                seed: prompt.seed,
                file,
                width: picture.width(),
                height: picture.height(),
                bytes: written.bytes,
                sha256: written.sha256,
            }));
        }
        self.reporter.phase(Phase::Sampling, total, total);
        Ok(())
    }

    fn export(&self, order: &Order) -> Result<Results> {
        self.reporter.phase(Phase::Exporting, 0, 1);
        let epoch = order.epoch(self.state.cursor);
        let context = ExportContext {
            spec: self.spec,
            steps: self.state.step,
            epoch,
            started_at_ms: self.state.started_at_ms,
        };
        let files = self.task.export(&self.spec.attempt_dir.join("results"), &context)?;
        let summary = json!({
            "steps": self.state.step,
            "epoch": epoch,
            "final_loss": self.state.last_loss,
            "train_s": self.state.train_ms as f64 / 1e3,
        });
        self.reporter.phase(Phase::Exporting, 1, 1);
        Ok(Results {
            files,
            summary: summary.as_object().cloned().unwrap_or_else(Map::new),
        })
    }

    /// The failure of a step whose loss or gradient is not finite; the adapter before it is saved first.
    fn not_finite(&mut self, step: u64, lr: f64) -> Result<TrainError> {
        let mut kept = "There was no step before it to keep.".to_owned();
        if self.state.step > 0 {
            self.save()?;
            kept = format!("The adapter after step {} is kept as a checkpoint.", self.state.step);
        }
        Ok(Problem::new(
            "loss.not_finite",
            "The loss is not a number any more",
            format!("At step {step}, with learning rate {lr:e}, the loss or its gradient was not finite. {kept}"),
        )
        .with_hint("Lower learning_rate (by 3 to 10 times), set max_grad_norm to 1, or look for broken pictures.")
        .into())
    }
}

/// Milliseconds since the Unix epoch.
fn now_ms() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}
