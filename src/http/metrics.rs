//! A job's curves and its log.

use axum::{
    Json,
    extract::{Path, Query, State},
    http::{HeaderMap, header},
    response::{IntoResponse as _, Response},
};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use utoipa::{IntoParams, ToSchema};

use super::{
    dto::{self, List, job_id, rfc3339},
    error::{ApiError, ApiResult, Code, ProblemDto},
};
use crate::{
    app::App,
    domain::{EventKind, MetricRow, downsample},
};

/// Figures that every step has.
const KEYS: [&str; 6] = ["loss", "lr", "grad_norm", "epoch", "step_ms", "samples_per_s"];
const MAX_POINTS: usize = 20_000;

/// Which figures, of which steps.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub(super) struct MetricsQuery {
    /// Names separated by commas; usually all.
    keys: Option<String>,
    /// First step.
    from: Option<u64>,
    /// Last step.
    to: Option<u64>,
    /// Most buckets, 1 to 20000, usually 2000; with no more steps than that nothing is lost.
    max_points: Option<usize>,
    /// `json`, `csv` or `ndjson` (every step, no buckets); usually by `Accept`.
    format: Option<String>,
}

/// Curves in columns: of each bucket of steps the last, smallest and largest value. `null`: no finite value there.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Metrics)]
pub(super) struct MetricsDto {
    /// Last step of each bucket.
    pub x: Vec<u64>,
    /// Per figure.
    #[schema(value_type = std::collections::BTreeMap<String, SeriesDto>)]
    pub series: Map<String, Value>,
    /// Steps that the curves are made of.
    pub n_steps: usize,
    /// Everything up to this event is contained; later rows come with `GET /jobs/{id}/events?after=`.
    pub cursor: String,
}

/// One figure; the lists are as long as `x`.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Series)]
pub(super) struct SeriesDto {
    pub last: Vec<Option<f64>>,
    pub min: Vec<Option<f64>>,
    pub max: Vec<Option<f64>>,
}

/// A job's curves, as columns, CSV or lines of JSON.
#[utoipa::path(get, path = "/jobs/{id}/metrics", tag = "results", params(("id" = String, Path), MetricsQuery), responses(
    (status = 200, content((MetricsDto = "application/json"), (String = "text/csv"), (String = "application/x-ndjson"))),
    (status = 400, body = ProblemDto), (status = 404, body = ProblemDto), (status = 406, body = ProblemDto)))]
pub(super) async fn job_metrics(
    State(app): State<App>,
    Path(id): Path<String>,
    Query(query): Query<MetricsQuery>,
    headers: HeaderMap,
) -> ApiResult<Response> {
    let offers = [
        ("json", "application/json"),
        ("csv", "text/csv"),
        ("ndjson", "application/x-ndjson"),
    ];
    let format = dto::negotiate(&headers, query.format.as_deref(), &offers)?;
    // The cursor is read before the rows: what is stored in between comes twice rather than never.
    let job = app.store.job(job_id(&id)?).await?;
    let rows = app
        .store
        .metrics(job.id, query.from.unwrap_or(0), query.to.unwrap_or(u64::MAX))
        .await?;
    let all = columns(&rows);
    let keys = match &query.keys {
        None => all,
        Some(keys) => {
            let keys: Vec<String> = keys.split(',').filter(|k| !k.is_empty()).map(str::to_owned).collect();
            if keys.len() > 64 || keys.iter().any(|k| k.len() > 64) {
                return Err(ApiError::new(Code::InvalidQuery, "`keys` may name at most 64 figures."));
            }
            keys
        }
    };
    let max_points = query.max_points.unwrap_or(2000);
    if !(1..=MAX_POINTS).contains(&max_points) {
        return Err(ApiError::new(
            Code::InvalidQuery,
            format!("`max_points` must be 1 to {MAX_POINTS}."),
        ));
    }
    Ok(match format {
        "csv" => ([(header::CONTENT_TYPE, "text/csv; charset=utf-8")], csv(&rows, &keys)).into_response(),
        "ndjson" => ([(header::CONTENT_TYPE, "application/x-ndjson")], ndjson(&rows, &keys)).into_response(),
        _ => {
            let series = downsample(&rows, &keys, max_points);
            let columns = series.series.into_iter().map(|(key, bucket)| {
                let column = SeriesDto {
                    last: bucket.last,
                    min: bucket.min,
                    max: bucket.max,
                };
                (key, serde_json::to_value(column).unwrap_or_default())
            });
            Json(MetricsDto {
                series: columns.collect(),
                x: series.x,
                n_steps: rows.len(),
                cursor: job.last_seq.to_string(),
            })
            .into_response()
        }
    })
}

fn columns(rows: &[MetricRow]) -> Vec<String> {
    let extra: std::collections::BTreeSet<&String> = rows.iter().flat_map(|row| row.extra.keys()).collect();
    KEYS.iter()
        .map(|k| (*k).to_owned())
        .chain(extra.into_iter().cloned())
        .collect()
}

fn csv(rows: &[MetricRow], keys: &[String]) -> String {
    let mut out = format!("step,attempt,t,{}\n", keys.join(","));
    for row in rows {
        out.push_str(&format!("{},{},{}", row.step, row.attempt, rfc3339(row.t_ms)));
        for key in keys {
            out.push(',');
            if let Some(value) = row.value(key) {
                out.push_str(&value.to_string());
            }
        }
        out.push('\n');
    }
    out
}

fn ndjson(rows: &[MetricRow], keys: &[String]) -> String {
    let mut out = String::new();
    for row in rows {
        let mut object = Map::new();
        object.insert("step".to_owned(), row.step.into());
        object.insert("attempt".to_owned(), row.attempt.into());
        object.insert("t".to_owned(), rfc3339(row.t_ms).into());
        for key in keys {
            object.insert(key.clone(), row.value(key).into());
        }
        out.push_str(&Value::Object(object).to_string());
        out.push('\n');
    }
    out
}

/// Which lines.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub(super) struct LogsQuery {
    /// So many of the newest lines, 1 to 10000, usually 1000.
    tail: Option<u32>,
    /// `json` or `text`; usually by `Accept`.
    format: Option<String>,
}

/// A line of a job's log.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = LogLine)]
pub(super) struct LogLineDto {
    /// Its number among the job's events; grows, with gaps.
    pub n: u64,
    /// When.
    pub ts: String,
    /// `debug`, `info`, `warn`, `error`.
    pub level: String,
    /// The line.
    pub message: String,
}

/// The newest lines of a job's log, oldest first.
#[utoipa::path(get, path = "/jobs/{id}/logs", tag = "results", params(("id" = String, Path), LogsQuery), responses(
    (status = 200, content((List<LogLineDto> = "application/json"), (String = "text/plain"))), (status = 404, body = ProblemDto), (status = 406, body = ProblemDto)))]
pub(super) async fn job_logs(
    State(app): State<App>,
    Path(id): Path<String>,
    Query(query): Query<LogsQuery>,
    headers: HeaderMap,
) -> ApiResult<Response> {
    let format = dto::negotiate(
        &headers,
        query.format.as_deref(),
        &[("json", "application/json"), ("text", "text/plain")],
    )?;
    let tail = query.tail.unwrap_or(1000);
    if !(1..=10_000).contains(&tail) {
        return Err(ApiError::new(Code::InvalidQuery, "`tail` must be 1 to 10000."));
    }
    let job = app.store.job(job_id(&id)?).await?;
    let events = app.store.newest_events(job.id, EventKind::Log, tail).await?;
    let text = |value: Option<&Value>| value.and_then(Value::as_str).unwrap_or("").to_owned();
    let lines: Vec<LogLineDto> = events
        .iter()
        .map(|event| LogLineDto {
            n: event.seq,
            ts: rfc3339(event.t_ms),
            level: text(event.data.get("level")),
            message: text(event.data.get("message")),
        })
        .collect();
    if format == "text" {
        let mut out = String::new();
        for line in &lines {
            // A line is one line, and no escape sequence reaches a terminal.
            let message: String = line
                .message
                .chars()
                .map(|c| if c.is_control() { ' ' } else { c })
                .collect();
            out.push_str(&format!("{} {:5} {message}\n", line.ts, line.level));
        }
        return Ok(([(header::CONTENT_TYPE, "text/plain; charset=utf-8")], out).into_response());
    }
    Ok(Json(json!(List {
        cursor: Some(job.last_seq.to_string()),
        ..List::complete(lines)
    }))
    .into_response())
}
