//! `lorad demo`: the server, one job on bundled data, and the same prompts before and after. It goes through the public API like
//! any other client, so what it shows is what a user gets.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use lorad::{serve::serve, telemetry};
use lorad_proto::event::Phase;
use serde_json::Value;

use super::{
    Exit,
    args::Demo,
    client::{Client, ServerEvent},
    print_problem_details,
    progress::{Progress, duration},
    runtime,
    serve::{self, Stop},
    tables::size,
};

/// How long the server may take to become ready.
const READY_WITHIN: Duration = Duration::from_secs(30);

/// Runs the command.
pub(crate) fn run(args: &Demo) -> Result<Exit> {
    let mut config = serve::demo_config(args)?;
    // The terminal shows the job; of the server only what went wrong.
    if std::env::var_os("LORAD_LOG__FILTER").is_none() {
        "warn".clone_into(&mut config.log.filter);
    }
    telemetry::init(&config.log);
    runtime()?.block_on(async {
        let mut stop = Stop::new()?;
        let server = serve(config).await?;
        let url = serve::url(&server);
        let client = Client::new(&url)?;
        ready(&client).await?;
        eprintln!("lorad is at {url}");
        let mut job = None;
        let outcome = tokio::select! {
            outcome = run_job(&client, &url, &mut job) => outcome,
            () = stop.asked() => Ok(Exit::Cancelled),
        };
        match (&outcome, &job) {
            // Workers outlive the server; nobody who stops a demo wants that.
            (Ok(Exit::Cancelled) | Err(_), Some(id)) => {
                let force = serde_json::json!({"mode": "force"});
                if client.post(&format!("/jobs/{id}/cancel"), &force).await.is_ok() {
                    eprintln!("the job is cancelled");
                }
            }
            (Ok(_), _) if !args.exit => {
                eprintln!("\nThe server stays up: {url} (Ctrl-C stops it)");
                stop.asked().await;
            }
            _ => {}
        }
        server.shutdown().await;
        outcome
    })
}

async fn ready(client: &Client) -> Result<()> {
    let deadline = Instant::now() + READY_WITHIN;
    loop {
        match client.get("/readyz").await {
            Ok(_) => return Ok(()),
            Err(error) if Instant::now() > deadline => return Err(error).context("the server did not become ready"),
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

/// Posts the demo job, notes its id in `posted_job`, follows it to its end and reports.
async fn run_job(client: &Client, url: &str, posted_job: &mut Option<String>) -> Result<Exit> {
    let request = client.get("/demo").await.context("ask for the demo's job")?;
    let posted = Instant::now();
    let job = client.post("/jobs", &request).await.context("post the demo job")?;
    let id = job["id"].as_str().context("the posted job has no id")?.to_owned();
    *posted_job = Some(id.clone());
    eprintln!("{url}/#/jobs/{id}");

    let mut view = View::new(posted);
    client
        .follow(&format!("/jobs/{id}/events"), |event| Ok(view.show(&event)))
        .await?;
    view.progress.finish();

    let job = client.get(&format!("/jobs/{id}")).await?;
    match job["status"].as_str() {
        Some("succeeded") => {}
        Some("cancelled") => {
            eprintln!("the job was cancelled");
            return Ok(Exit::Cancelled);
        }
        Some("failed") => {
            let problem = serde_json::from_value::<lorad_proto::problem::Problem>(job["error"].clone());
            match problem {
                Ok(problem) => {
                    eprintln!("the job failed: {problem} ({})", problem.code);
                    print_problem_details(&problem);
                }
                Err(_) => eprintln!("the job failed: {}", job["error"]),
            }
            return Ok(Exit::JobFailed);
        }
        other => bail!(
            "the job's events ended while it is {}",
            other.unwrap_or("in no known state")
        ),
    }
    eprintln!(
        "trained in {}; first loss {:.1} s after the post",
        duration(posted.elapsed().as_secs_f64()),
        view.first_loss.map_or(f64::NAN, |at| at.as_secs_f64())
    );
    files(client, url, &id).await?;
    comparison(client, &id).await?;
    Ok(Exit::Ok)
}

/// The result files: name and size for people, addresses as data.
async fn files(client: &Client, url: &str, id: &str) -> Result<()> {
    let files = client.get(&format!("/jobs/{id}/files")).await?;
    for file in list(&files) {
        let (Some(name), bytes) = (file["name"].as_str(), file["bytes"].as_u64().unwrap_or(0)) else {
            continue;
        };
        eprintln!("  {name} ({})", size(bytes));
        println!("{url}/jobs/{id}/files/{name}");
    }
    Ok(())
}

/// How much of what is drawn is near black, before (step 0: the base model) and after, prompt by prompt and as the median: the
/// bundled pictures are silhouettes, and the base has never drawn one.
async fn comparison(client: &Client, id: &str) -> Result<()> {
    let samples = client.get(&format!("/jobs/{id}/samples")).await?;
    let samples: Vec<&Value> = list(&samples).collect();
    let last = samples
        .iter()
        .filter_map(|sample| sample["step"].as_u64())
        .max()
        .unwrap_or(0);
    if last == 0 {
        bail!("the demo job drew no pictures after training");
    }
    let mut shares = [Vec::new(), Vec::new()];
    for (column, step) in [0, last].into_iter().enumerate() {
        for sample in samples.iter().filter(|sample| sample["step"] == step) {
            let path = sample["url"].as_str().context("a sample has no address")?;
            let png = client.bytes(path).await?;
            // Nothing drawn at all is as little a silhouette as a drawing without black.
            let share = lorad::trainer::near_black_share(&png).unwrap_or(0.0);
            shares[column].push((sample["prompt"].as_str().unwrap_or_default().to_owned(), share));
        }
    }
    let [before, after] = &shares;
    for ((prompt, base), (_, lora)) in before.iter().zip(after) {
        eprintln!("  {prompt}: {base:.2} -> {lora:.2}");
    }
    let median_of = |column: &[(String, f64)]| median(column.iter().map(|(_, share)| *share).collect());
    println!(
        "near-black share: base {:.2} -> lora {:.2}",
        median_of(before).context("the base drew no pictures")?,
        median_of(after).context("the adapter drew no pictures")?
    );
    Ok(())
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        n if n % 2 == 1 => Some(values[middle]),
        _ => Some((values[middle - 1] + values[middle]) / 2.0),
    }
}

/// Elements of a list answer, `{"object": "list", "data": […]}`.
fn list(answer: &Value) -> impl Iterator<Item = &Value> {
    answer["data"].as_array().into_iter().flatten()
}

/// What the terminal shows of a job's events.
struct View {
    progress: Progress,
    posted: Instant,
    first_loss: Option<Duration>,
    steps_per_s: f64,
    total: u64,
}

impl View {
    fn new(posted: Instant) -> Self {
        Self {
            progress: Progress::new(),
            posted,
            first_loss: None,
            steps_per_s: 0.0,
            total: 0,
        }
    }

    /// Shows an event; `false` ends the stream.
    fn show(&mut self, event: &ServerEvent) -> bool {
        let data = &event.data;
        match event.name.as_str() {
            "progress" => self.progress_event(data),
            "metrics" => self.metrics(data),
            "status" => return !is_over(&data["to"]),
            // On a fresh connection to a job that is already over.
            "snapshot" => return !is_over(&data["status"]),
            "alert" => self.progress.note(&format!(
                "{}: {}",
                data["code"].as_str().unwrap_or("alert"),
                data["detail"].as_str().unwrap_or_default()
            )),
            _ => {}
        }
        true
    }

    fn progress_event(&mut self, data: &Value) {
        self.steps_per_s = data["it_s"].as_f64().unwrap_or(self.steps_per_s);
        let (step, total) = (data["step"].as_u64().unwrap_or(0), data["total"].as_u64().unwrap_or(0));
        match serde_json::from_value::<Phase>(data["phase"].clone()) {
            Ok(Phase::Training) => {
                self.total = total;
                self.progress.step(step, total, None, self.steps_per_s);
            }
            Ok(phase) => self.progress.phase(phase, data["done"].as_u64().unwrap_or(0), total),
            Err(_) => {}
        }
    }

    fn metrics(&mut self, data: &Value) {
        let columns: Vec<&str> = data["cols"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .collect();
        let column = |name| columns.iter().position(|column| *column == name);
        let (Some(step), Some(loss)) = (column("step"), column("loss")) else {
            return;
        };
        for row in data["rows"].as_array().into_iter().flatten() {
            let (step, loss) = (row[step].as_u64().unwrap_or(0), row[loss].as_f64());
            if loss.is_some() && self.first_loss.is_none() {
                self.first_loss = Some(self.posted.elapsed());
            }
            self.progress.step(step, self.total.max(step), loss, self.steps_per_s);
        }
    }
}

fn is_over(status: &Value) -> bool {
    matches!(status.as_str(), Some("succeeded" | "failed" | "cancelled"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn event(name: &str, data: Value) -> ServerEvent {
        ServerEvent {
            name: name.to_owned(),
            data,
        }
    }

    #[test]
    fn the_median_of_an_even_number_is_between_the_middle_two() {
        assert_eq!(median(vec![0.9, 0.1, 0.5, 0.7]), Some(0.6));
        assert_eq!(median(vec![0.3]), Some(0.3));
        assert_eq!(median(Vec::new()), None);
    }

    #[test]
    fn the_stream_ends_with_a_final_status_and_the_first_loss_is_timed() {
        let mut view = View::new(Instant::now());
        assert!(view.show(&event("status", json!({"from": "queued", "to": "running"}))));
        assert!(view.show(&event("metrics", json!({"cols": ["step", "loss"], "rows": [[1, 0.5]]}))));
        assert!(view.first_loss.is_some());
        assert!(!view.show(&event("status", json!({"from": "saving", "to": "succeeded"}))));
    }
}
