//! Expectations against experience: what finished runs say about the next one, and whether a job fits the machine. Pure
//! decisions.

use lorad_proto::{catalog::Plan, problem::Problem};

/// How fast a finished job's steps really were.
#[derive(Debug, Clone, PartialEq)]
pub struct MeasuredRun {
    /// Its base.
    pub base_model: String,
    /// Its plan's `workload`.
    pub workload: String,
    /// What arithmetic and calibration alone had said, seconds.
    pub modelled_step_s: f64,
    /// Median of its steps, seconds.
    pub measured_step_s: f64,
}

/// Newest runs that a correction looks at.
pub const RUNS: u32 = 100;
/// Of those, the newest that are alike.
const NEWEST: usize = 5;

/// What to multiply modelled times by, from runs on the same device, newest first: runs of the same base and workload
/// decide; else those of the same base; else all; 1 if there are none.
pub fn correction(base_model: &str, workload: &str, modelled_step_s: f64, runs: &[MeasuredRun]) -> f64 {
    let ratio = |run: &MeasuredRun| run.measured_step_s / run.modelled_step_s;
    let same_base = |run: &&MeasuredRun| run.base_model == base_model;
    let alike = runs.iter().filter(same_base).filter(|run| run.workload == workload);
    // The calibration may have met a busier machine then; the measured seconds did not.
    median(alike.map(|run| run.measured_step_s / modelled_step_s))
        .or_else(|| median(runs.iter().filter(same_base).map(ratio)))
        .or_else(|| median(runs.iter().map(ratio)))
        .unwrap_or(1.0)
}

fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let usable = values.filter(|v| v.is_finite() && *v > 0.0);
    let mut newest: Vec<f64> = usable.take(NEWEST).collect();
    newest.sort_by(f64::total_cmp);
    newest.get(newest.len() / 2).copied()
}

/// Refuses a job that needs more memory than there is, however long it waits.
///
/// # Errors
/// `memory.too_small`, with both figures and what helps.
pub fn fits(plan: &Plan, total_bytes: Option<u64>) -> Result<(), Problem> {
    match total_bytes {
        Some(total) if plan.memory_bytes > total => Err(Problem::new(
            "memory.too_small",
            "The job does not fit into memory",
            format!(
                "It needs about {} MiB ({}); there are {} MiB.",
                plan.memory_bytes >> 20,
                plan.workload,
                total >> 20
            ),
        )
        .with_hint(
            "Lower batch_size (and raise gradient_accumulation_steps, with the same result), set gradient_checkpointing \
             to on, mixed_precision to bf16, or lower resolution.",
        )),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(base: &str, workload: &str, modelled: f64, measured: f64) -> MeasuredRun {
        MeasuredRun {
            base_model: base.to_owned(),
            workload: workload.to_owned(),
            modelled_step_s: modelled,
            measured_step_s: measured,
        }
    }

    #[test]
    fn the_most_similar_runs_correct_the_estimate() {
        let runs = [
            run("a", "batch 1", 1.0, 3.0),
            run("a", "batch 2", 2.0, 8.0),
            run("b", "batch 1", 1.0, 9.0),
        ];
        let near = |a: f64, b: f64| (a - b).abs() < 1e-12;
        // Modelled at 2 s now, measured at 3 s then: 3 s.
        assert!(near(correction("a", "batch 1", 2.0, &runs) * 2.0, 3.0));
        assert!(near(correction("a", "batch 7", 1.0, &runs), 4.0));
        assert!(near(correction("c", "batch 1", 1.0, &runs), 4.0));
        assert!(near(correction("a", "batch 1", 2.0, &[]), 1.0));
    }

    #[test]
    fn runs_without_figures_and_single_outliers_do_not_count() {
        let mut runs = vec![run("a", "x", 0.0, 1.0), run("a", "x", 1.0, 50.0)];
        runs.extend((0..4).map(|_| run("a", "x", 1.0, 2.0)));
        assert!((correction("a", "y", 1.0, &runs) - 2.0).abs() < 1e-12);
    }

    #[test]
    fn a_job_larger_than_the_machine_is_refused_with_both_figures() {
        let plan = Plan {
            memory_bytes: 9 << 30,
            ..Plan::default()
        };
        assert!(fits(&plan, None).is_ok() && fits(&plan, Some(9 << 30)).is_ok());
        let Err(problem) = fits(&plan, Some(8 << 30)) else {
            panic!("admitted")
        };
        assert!(
            problem.detail.contains("9216") && problem.detail.contains("8192"),
            "{problem}"
        );
    }
}
