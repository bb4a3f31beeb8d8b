//! The training loop. The only one: families give a [`Task`], and this drives it.
//!
//! [`attempt`] reads from top to bottom: open, resume, check the gradients, draw the base model's pictures, take the
//! steps, draw again, export.

mod mend;

use std::{
    collections::BTreeMap,
    fs,
    path::PathBuf,
    sync::Once,
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use candle_core::Tensor;
use lorad_faults::{Moment, Point, around, pass};
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
    device, memory,
    optim::{ema::Ema, fields::OptimizerSettings, schedule::LrSchedule},
    rescue::Verdict,
    state::TrainState,
    step::{StepConfig, Stepper},
    task::{ExportContext, Family, Prompt, Reporter, Task},
    validation::{Course, Publish, Validation, ValidationSettings},
};

/// The hyperparameters that the loop itself reads; a family may have more.
#[derive(Debug, Clone, Deserialize)]
struct LoopSettings {
    max_train_steps: Option<u64>,
    num_epochs: Option<u64>,
    batch_size: usize,
    gradient_accumulation_steps: usize,
    #[serde(flatten)]
    lr: LrSchedule,
    #[serde(flatten)]
    optimizer: OptimizerSettings,
    l2_lambda: f64,
    seed: u64,
    checkpoint_every_steps: u64,
    keep_checkpoints: usize,
    #[serde(flatten)]
    validation: ValidationSettings,
    self_rescue: bool,
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

    checkpoint::sweep(&spec.attempt_dir.join("checkpoints"))?;
    let mut run = Run::new(spec, settings, task, reporter)?;
    let mut order = Order::new(
        run.settings.seed,
        task.buckets(),
        run.settings.batch_size,
        run.settings.gradient_accumulation_steps,
    );

    // --- check that the gradients point where the loss falls ---
    // On the adapters as they start, also of a run that is resumed: where one is over-trained, its loss can be too rough for
    // differences, and it would not be let on.
    reporter.phase(Phase::CheckingGradients, 0, 1);
    run.check_gradients(&order)?;
    reporter.phase(Phase::CheckingGradients, 1, 1);

    // --- resume ---
    if let Some(dir) = &spec.resume_from {
        run.resume(dir)?;
        *reached = run.state.step;
    }
    if run.state.memory_rescues > 0 {
        run.micro_batch = run.micro_batch.div_ceil(2);
    } else if spec.after_out_of_memory {
        run.shrink(crate::error::out_of_memory("The worker was ended for want of memory.".to_owned()).into())?;
    }
    order = order.with_micro_batch(run.micro_batch);
    let total_steps = planned_steps(run.settings.max_train_steps, run.settings.num_epochs, &order);
    reporter.check_stop()?;

    // --- the base model's pictures and its loss on held-out items ---
    if run.state.step == 0 {
        run.draw(0, false)?;
        run.state.validation = run.validate(false)?.map(|v| Course::new(v.loss));
    }
    run.origin = Some(run.snapshot()?);

    // --- train ---
    let trivial_loss = task.trivial_loss();
    while run.state.step < total_steps && !run.out_of_patience() {
        if let Some(stopped) = run.obey(reporter.command())? {
            return Ok(stopped);
        }
        let started = Instant::now();
        let step = run.state.step + 1;
        let lr = run.settings.lr.at(step, total_steps) * run.state.lr_factor;
        let window = order.window(step, run.state.cursor);
        let n_samples = window.n_samples;
        let losses = window
            .micro_batches
            .iter()
            .map(|batch| Ok((task.loss(batch)?, batch.items.len() as f64 / n_samples as f64)));
        let gradients = match run.stepper.gradients(losses) {
            Err(e) if e.is_out_of_memory() => {
                run.shrink(e)?;
                order = order.with_micro_batch(run.micro_batch);
                continue;
            }
            gradients => gradients?,
        };
        let outcome = run.stepper.apply(lr, gradients)?;
        let elapsed = started.elapsed();
        run.state.train_ms += u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX);
        let finite = |v: f64| v.is_finite().then_some(v);
        let mut extra = BTreeMap::new();
        if run.settings.l2_lambda > 0.0 {
            extra.insert("l2_penalty".to_owned(), outcome.l2_penalty);
        }
        extra.extend(
            outcome
                .parts
                .iter()
                .map(|(part, loss)| (format!("loss_bin_{part}"), *loss)),
        );
        if outcome.applied {
            run.state.step = step;
            *reached = step;
            run.state.cursor += n_samples as u64;
            run.state.last_loss = finite(outcome.loss);
            if let Some(ema) = &mut run.ema {
                ema.update(&run.stepper.optimizer, step)?;
            }
            extra.extend(run.validate_if_due(step, total_steps)?);
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
            extra,
        }));
        let loss = outcome.applied.then_some(outcome.loss);
        let verdict = run.state.health.observe(step, loss, trivial_loss);
        if verdict != Verdict::Healthy {
            run.rescue(step, lr, verdict)?;
            *reached = run.state.step;
            continue;
        }
        let due = |every: u64| every > 0 && step.is_multiple_of(every);
        if due(run.settings.checkpoint_every_steps) || run.save_soon {
            run.save_if_possible()?;
        }
        if due(spec.sampling.every_steps) && step < total_steps {
            run.draw(step, true)?;
        }
    }
    run.choose_result();

    // --- the adapter's pictures, and the files ---
    run.draw(run.state.step, true)?;
    let results = run.export(&order)?;
    Ok(WorkerEvent::Done { results })
}

/// Optimizer steps of a run: `max_train_steps`, or `num_epochs` passes over the samples of `order`.
pub fn planned_steps(max_train_steps: Option<u64>, num_epochs: Option<u64>, order: &Order) -> u64 {
    max_train_steps.unwrap_or_else(|| num_epochs.unwrap_or(1).saturating_mul(order.steps_per_epoch()))
}

/// Fixes the number of threads of CPU kernels, once per process: results are byte-identical only for the same number.
fn use_threads(threads: Option<usize>) {
    static ONCE: Once = Once::new();
    if let Some(n) = threads {
        // Fails only if the pool is already running, with the number it was made with.
        ONCE.call_once(|| drop(rayon::ThreadPoolBuilder::new().num_threads(n).build_global()));
    }
}

/// Optimizer steps whose samples the gradient check may look at.
const CHECKED_WINDOWS: u64 = 16;

/// State of the best adapter in a checkpoint: `<tensor>.best`.
const BEST: &str = "best";

/// An attempt under way.
struct Run<'a> {
    spec: &'a AttemptSpec,
    settings: LoopSettings,
    task: &'a dyn Task,
    reporter: &'a dyn Reporter,
    stepper: Stepper,
    /// What pictures and files show instead of the newest values, if the job wants it.
    ema: Option<Ema>,
    state: TrainState,
    /// Most samples of a micro-batch: `batch_size`, until memory runs out.
    micro_batch: usize,
    /// Newest served requests, so that a command that is told twice is obeyed once.
    served_checkpoint: u64,
    served_sample: u64,
    /// Step of the newest checkpoint.
    saved_at: Option<u64>,
    /// A checkpoint is owed after the next step: a rescue must not be forgotten.
    save_soon: bool,
    /// Where this attempt began, for a rescue that finds no checkpoint.
    origin: Option<Snapshot>,
    /// What was shown after the best validation, flat.
    best: Option<Tensor>,
    /// Whether training is over and the best adapter is the result.
    best_is_result: bool,
}

impl<'a> Run<'a> {
    fn new(
        spec: &'a AttemptSpec,
        settings: LoopSettings,
        task: &'a dyn Task,
        reporter: &'a dyn Reporter,
    ) -> Result<Self> {
        let config = StepConfig {
            optimizer: settings.optimizer.config(),
            max_grad_norm: settings.optimizer.max_grad_norm,
            l2_lambda: settings.l2_lambda,
        };
        let mut fingerprints = task.fingerprints();
        let text = serde_json::Value::from(spec.hyperparameters.clone()).to_string();
        fingerprints.insert("hyperparameters".to_owned(), hex::encode(Sha256::digest(text)));
        let stepper = Stepper::with_lr_factors(task.adapters(), config, |tensor| task.lr_factor(tensor))?;
        let ema = match settings.optimizer.ema_decay {
            0.0 => None,
            decay => Some(Ema::new(&stepper.optimizer, decay)?),
        };
        Ok(Self {
            stepper,
            ema,
            state: TrainState {
                started_at_ms: now_ms(),
                fingerprints,
                ..TrainState::default()
            },
            spec,
            micro_batch: settings.batch_size,
            settings,
            task,
            reporter,
            served_checkpoint: 0,
            served_sample: 0,
            saved_at: None,
            save_soon: false,
            origin: None,
            best: None,
            best_is_result: false,
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
        self.restore(Snapshot {
            state,
            adapter,
            optimizer,
        })?;
        self.saved_at = Some(self.state.step);
        self.reporter
            .log(Level::Info, &format!("continuing after step {}", self.state.step));
        Ok(())
    }

    /// Takes over everything that a checkpoint holds.
    fn restore(&mut self, snapshot: Snapshot) -> Result<()> {
        for (name, var) in self.task.adapters().named_vars() {
            let Some(tensor) = snapshot.adapter.get(&name) else {
                return Err(Problem::new(
                    "checkpoint.damaged",
                    "The checkpoint is damaged",
                    format!("It has no tensor {name}."),
                )
                .into());
            };
            var.set(&tensor.to_device(var.device())?)?;
        }
        self.stepper
            .optimizer
            .load_state(&snapshot.optimizer, snapshot.state.step)?;
        if let Some(ema) = &mut self.ema {
            ema.load(&self.stepper.optimizer, &snapshot.optimizer)?;
        }
        let has_best = snapshot.state.validation.as_ref().is_some_and(|v| v.best_step > 0);
        let best = has_best.then(|| self.stepper.optimizer.layout().join(BEST, &snapshot.optimizer));
        self.best = best.transpose()?;
        self.state = snapshot.state;
        Ok(())
    }

    /// Everything that training continues from, as copies: `Var::set` writes in place.
    fn snapshot(&self) -> Result<Snapshot> {
        let adapter = self
            .task
            .adapters()
            .named_vars()
            .into_iter()
            .map(|(name, var)| Ok((name, var.as_detached_tensor().copy()?)))
            .collect::<Result<_>>()?;
        let mut optimizer = self.stepper.optimizer.state()?;
        if let Some(ema) = &self.ema {
            optimizer.extend(ema.state(&self.stepper.optimizer)?);
        }
        if let Some(best) = &self.best {
            optimizer.extend(self.stepper.optimizer.layout().split(BEST, best)?);
        }
        Ok(Snapshot {
            state: self.state.clone(),
            adapter,
            optimizer,
        })
    }

    /// Writes a checkpoint, announces it, and deletes the oldest beyond the number to keep.
    fn save(&mut self) -> Result<()> {
        if self.saved_at == Some(self.state.step) {
            return Ok(());
        }
        let snapshot = self.snapshot()?;
        let root = self.checkpoints();
        let written = checkpoint::write(&root, &snapshot)?;
        self.saved_at = Some(self.state.step);
        self.save_soon = false;
        let announce = || {
            self.reporter.emit(WorkerEvent::Checkpoint {
                step: self.state.step,
                dir: written.dir,
                bytes: written.bytes,
                sha256: written.sha256,
            });
            Ok(())
        };
        around(Point::AnnounceCheckpoint, announce).map_err(TrainError::io("announce", &root))?;
        checkpoint::prune(&root, self.settings.keep_checkpoints)
    }

    /// Writes a checkpoint that nobody waits for. One that the disk does not take costs no training: the one before it
    /// stays, the user is told, and the next one is tried.
    fn save_if_possible(&mut self) -> Result<()> {
        let problem = match self.save() {
            Err(error @ TrainError::Io { .. }) => error.into_problem(),
            other => return other,
        };
        self.reporter.emit(WorkerEvent::Alert {
            code: "checkpoint.not_written".to_owned(),
            severity: Level::Warn,
            step: self.state.step,
            detail: format!("{} The checkpoint before it stays; training goes on.", problem.detail),
        });
        Ok(())
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
                    self.choose_result();
                    let order = Order::new(self.settings.seed, self.task.buckets(), 1, 1);
                    Some(self.export(&order)?)
                } else {
                    None
                };
                stopped(step, StopReason::Cancelled, results)
            }
        }
    }

    /// The adapter that pictures and files show, flat: the best one once training is over, the moving average if there is
    /// one; `None`: the newest.
    fn shown_values(&self) -> Option<&Tensor> {
        let best = self.best.as_ref().filter(|_| self.best_is_result);
        best.or_else(|| self.ema.as_ref().map(Ema::average))
    }

    /// Runs `work` with the adapter that pictures and files show.
    fn shown<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        match self.shown_values() {
            Some(values) => self.stepper.optimizer.lend(values, work),
            None => work(),
        }
    }

    /// Loss on the held-out items; `None` if there are none.
    fn validate(&self, with_adapter: bool) -> Result<Option<Validation>> {
        let mut on_progress = || self.stop_if_cancelled();
        self.shown(|| self.task.validate(with_adapter, self.micro_batch, &mut on_progress))
    }

    /// Validates if it is time; the figures, for the step's metrics.
    fn validate_if_due(&mut self, step: u64, total_steps: u64) -> Result<BTreeMap<String, f64>> {
        let every = self.settings.validation.validation_every_steps;
        if self.state.validation.is_none() || !(step.is_multiple_of(every) || step == total_steps) {
            return Ok(BTreeMap::new());
        }
        let Some(found) = self.validate(true)? else {
            return Ok(BTreeMap::new());
        };
        let best = match self.shown_values() {
            Some(values) => values.clone(),
            None => self.stepper.optimizer.flat_parameters()?,
        };
        let Some(course) = &mut self.state.validation else {
            return Ok(BTreeMap::new());
        };
        let mut figures = BTreeMap::from([
            ("validation_loss".to_owned(), found.loss),
            ("base_validation_loss".to_owned(), course.baseline),
        ]);
        figures.extend(
            (1..)
                .zip(&found.bins)
                .map(|(i, loss)| (format!("validation_loss_t{i}"), *loss)),
        );
        if course.observe(step, found.loss) {
            self.best = Some(best);
        }
        Ok(figures)
    }

    fn out_of_patience(&self) -> bool {
        let patience = self.settings.validation.early_stopping_patience;
        self.state.validation.as_ref().is_some_and(|v| v.exhausted(patience))
    }

    /// Training is over: says why, if early, and which adapter is the result.
    fn choose_result(&mut self) {
        let Some(course) = &self.state.validation else { return };
        if self.out_of_patience() {
            self.reporter.emit(WorkerEvent::Alert {
                code: "training.stopped_early".to_owned(),
                severity: Level::Info,
                step: self.state.step,
                detail: format!(
                    "{} validations in a row found nothing better than step {}.",
                    course.since_best, course.best_step
                ),
            });
        }
        self.best_is_result = self.settings.validation.publish == Publish::Best && self.best.is_some();
        if self.best_is_result && course.best_step < self.state.step {
            self.reporter.emit(WorkerEvent::Alert {
                code: "result.earlier_step".to_owned(),
                severity: Level::Info,
                step: course.best_step,
                detail: format!(
                    "The result is the adapter after step {}: its loss on held-out items was {:.4}, the least of all (base \
                     model: {:.4}).",
                    course.best_step, course.best_loss, course.baseline
                ),
            });
        }
    }

    /// Only a plain cancel interrupts drawing and validating: everything else waits for the step boundary.
    fn stop_if_cancelled(&self) -> Result<()> {
        match self.reporter.command() {
            Command::Cancel { save: false } => Err(TrainError::Stopped(StopReason::Cancelled)),
            _ => Ok(()),
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
        let mut on_progress = || self.stop_if_cancelled();
        let pictures = self.shown(|| self.task.sample(&prompts, sampling, with_adapter, &mut on_progress))?;
        let dir = self.spec.attempt_dir.join("samples");
        fs::create_dir_all(&dir).map_err(TrainError::io("create", &dir))?;
        for (i, (picture, prompt)) in pictures.iter().zip(prompts).enumerate() {
            let file = format!("{step:08}-{i:02}.png");
            let path = dir.join(&file);
            let save = || picture.save_with_format(&path, image::ImageFormat::Png);
            around(Point::WriteSample, save).map_err(|e| TrainError::io("write", &path)(image_error(e)))?;
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
        let dir = self.spec.attempt_dir.join("results");
        pass(Point::WriteResults, Moment::Before).map_err(TrainError::io("write", &dir))?;
        let files = self.shown(|| self.task.export(&dir, &context))?;
        pass(Point::WriteResults, Moment::After).map_err(TrainError::io("write", &dir))?;
        let mut summary = json!({
            "steps": self.state.step,
            "epoch": epoch,
            "final_loss": self.state.last_loss,
            "train_s": self.state.train_ms as f64 / 1e3,
        });
        if let Some(course) = &self.state.validation {
            summary["base_validation_loss"] = json!(course.baseline);
            summary["best_validation_loss"] = json!(course.best_loss);
            summary["best_step"] = json!(course.best_step);
        }
        if self.state.memory_rescues > 0 {
            summary["micro_batch"] = json!(self.micro_batch);
        }
        if self.state.rescues > 0 {
            summary["rescues"] = json!(self.state.rescues);
        }
        if let Some(bytes) = memory::peak_resident_bytes() {
            summary["peak_memory_bytes"] = json!(bytes);
        }
        self.reporter.phase(Phase::Exporting, 1, 1);
        Ok(Results {
            files,
            summary: summary.as_object().cloned().unwrap_or_else(Map::new),
        })
    }
}

/// What the disk said, if it was the disk: its kind tells a full one.
fn image_error(error: image::ImageError) -> std::io::Error {
    match error {
        image::ImageError::IoError(error) => error,
        other => std::io::Error::other(other),
    }
}

/// Milliseconds since the Unix epoch.
fn now_ms() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}
