//! Result files: verified against what the worker announced, published, and recorded together with the job's last change
//! of status.

use std::{collections::BTreeSet, path::PathBuf, time::Duration};

use lorad_proto::{event::Results, problem::Problem};

use crate::{
    app::{App, remove_dir},
    blobs::BlobError,
    domain::{ArtifactKind, Desired, Job, JobId, JobStatus, artifact::is_plain_file_name},
    store::{Attempt, NewArtifact, StoreError},
};

/// Pause before results are published once more.
const TRY_AGAIN: Duration = Duration::from_secs(1);

/// How often result files are written when the disk fails.
const TRIES: u32 = 5;

/// Why results were not published.
enum Unpublished {
    /// There is no room; a matter of time.
    DiskFull(String),
    /// The disk failed; writing anew may help.
    StoreFailed(Box<Problem>),
    /// Another try would give the same.
    Unusable(Box<Problem>),
}

/// Publishes what an attempt delivered and makes its job final. On an error of the store the job stays in `saving`, and
/// the next round tries again: publishing twice is harmless.
pub(super) async fn publish(app: &App, attempt: &Attempt) {
    let Some(results) = attempt.results() else { return };
    let mut published = publish_files(app, attempt, results).await;
    for _ in 1..TRIES {
        let Err(Unpublished::StoreFailed(problem)) = &published else {
            break;
        };
        tracing::error!(job.id = %attempt.job_id, detail = problem.detail, "result files were not published: trying again");
        tokio::time::sleep(TRY_AGAIN).await;
        published = publish_files(app, attempt, results).await;
    }
    let settled = match published {
        // Everything is trained and lies in the attempt's folder: the job waits in `saving` until there is room.
        Err(Unpublished::DiskFull(detail)) => {
            tracing::error!(job.id = %attempt.job_id, detail, "the disk has no room for a job's result files: trying again");
            tokio::time::sleep(TRY_AGAIN).await;
            return;
        }
        Ok(artifacts) => {
            app.store
                .complete(attempt.job_id, attempt.attempt, &artifacts, &results.summary)
                .await
        }
        Err(Unpublished::Unusable(problem) | Unpublished::StoreFailed(problem)) => {
            app.store.fail_attempt(attempt.job_id, attempt.attempt, &problem).await
        }
    };
    match settled {
        Ok(job) => {
            tracing::info!(job.id = %job.id, status = %job.status, files = results.files.len(), "a job is complete");
            app.traces.job(&job);
            clean_up(app, &job).await;
            app.changed(job);
        }
        // The job was settled in another way meanwhile (cancelled by force).
        Err(StoreError::Fenced { .. }) => app.sweep_files(attempt.job_id).await,
        Err(error) => {
            tracing::error!(job.id = %attempt.job_id, error = &error as &dyn std::error::Error, "results were not recorded");
            tokio::time::sleep(TRY_AGAIN).await;
        }
    }
}

async fn publish_files(app: &App, attempt: &Attempt, results: &Results) -> Result<Vec<NewArtifact>, Unpublished> {
    let mut artifacts = Vec::new();
    for file in &results.files {
        if !is_plain_file_name(&file.name) {
            let detail = format!("{:?} is no plain file name.", file.name);
            return Err(Unpublished::Unusable(Box::new(unusable(detail))));
        }
        let source = attempt.dir.join("results").join(&file.name);
        app.blobs
            .publish(attempt.job_id, &file.name, &source, file.bytes, &file.sha256)
            .await
            .map_err(|error| unpublished(&error))?;
        artifacts.push(NewArtifact {
            name: file.name.clone(),
            kind: ArtifactKind::from(file.kind),
            bytes: file.bytes,
            sha256: file.sha256.clone(),
        });
    }
    Ok(artifacts)
}

fn unusable(detail: String) -> Problem {
    Problem::new("results.unusable", "The result files could not be published", detail)
        .with_hint("Look at the free space of the data directory and at the job's worker log, then retry the job.")
}

fn unpublished(error: &BlobError) -> Unpublished {
    let mut detail = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        detail.push_str(": ");
        detail.push_str(&cause.to_string());
        source = cause.source();
    }
    match error {
        _ if error.is_disk_full() => Unpublished::DiskFull(detail),
        BlobError::Store { .. } => Unpublished::StoreFailed(Box::new(unusable(detail))),
        _ => Unpublished::Unusable(Box::new(unusable(detail))),
    }
}

/// At the start of the server: removes what a server that died between a row and its files left behind, the files of deleted
/// jobs and those that final jobs do not need.
pub(crate) async fn sweep(app: &App) {
    let names = |dir: PathBuf| std::fs::read_dir(dir).into_iter().flatten().flatten();
    let folders = names(app.data.jobs()).chain(names(app.data.artifacts()));
    let ids: BTreeSet<JobId> = folders
        .filter_map(|folder| folder.file_name().to_str()?.parse().ok())
        .collect();
    for id in ids {
        match app.store.job(id).await {
            Ok(job) => clean_up(app, &job).await,
            Err(StoreError::NotFound { .. }) => {
                tracing::info!(job.id = %id, "removing the files of a deleted job");
                remove_dir(app.data.job(id)).await;
                remove_dir(app.data.artifacts().join(id.to_string())).await;
            }
            Err(error) => {
                tracing::warn!(job.id = %id, error = &error as &dyn std::error::Error, "a job's files were not looked at");
            }
        }
    }
}

/// Removes what a final job's attempts do not need any more: copies of published files, and for a job that was cancelled
/// without saving, everything. Published files that were not recorded go in any case.
pub(super) async fn clean_up(app: &App, job: &Job) {
    app.sweep_files(job.id).await;
    match job.status {
        JobStatus::Cancelled if job.desired != Desired::CancelSave => {
            // A worker that still runs would write into the void; its end calls here again.
            match app.store.live_attempts().await {
                Ok(live) if live.iter().any(|attempt| attempt.job_id == job.id) => {}
                Ok(_) => remove_dir(app.data.job(job.id)).await,
                Err(error) => tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "a cancelled job's files were kept"
                ),
            }
        }
        JobStatus::Succeeded | JobStatus::Cancelled => {
            let attempts = app.data.job(job.id).join("attempts");
            for n in 1..=job.attempt {
                let dir = attempts.join(n.to_string());
                remove_dir(dir.join("results")).await;
                remove_dir(dir.join("samples")).await;
            }
        }
        _ => {}
    }
}
