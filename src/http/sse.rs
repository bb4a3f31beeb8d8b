//! A job's events as they happen: `text/event-stream`, resumable by `Last-Event-ID`, also across a server restart.
//!
//! [`crate::events::Follower`] gives stored events without gap or double; this file only frames them. `id:` is the
//! event's number within the job; progress carries none, because it is not stored.

use std::{
    collections::VecDeque,
    convert::Infallible,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use axum::{
    Extension,
    extract::{Path, Query, State},
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header},
    response::{
        IntoResponse as _, Response,
        sse::{Event, KeepAlive, Sse},
    },
};
use futures_util::stream;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use utoipa::IntoParams;

use super::{
    HttpFigures,
    dto::{job_id, rfc3339},
    error::{ApiError, ApiResult, Code, ProblemDto},
    files::file_url,
    jobs::{ProgressDto, describe},
};
use crate::{
    app::App,
    domain::{EventKind, Job, JobEvent, JobStatus},
    events::{Follower, News},
    store::StoreError,
};

/// What a browser waits before it connects again.
const RETRY: Duration = Duration::from_millis(2000);
const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");
const X_ACCEL_BUFFERING: HeaderName = HeaderName::from_static("x-accel-buffering");

/// Where to start.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub(super) struct EventsQuery {
    /// Number of the last event seen, 0: from the first; the header `Last-Event-ID` goes before it. Without either, the
    /// stream starts with a `snapshot` of the job and goes on from now.
    after: Option<String>,
}

/// A job's events: `snapshot`, `status`, `progress`, `metrics`, `log`, `sample`, `checkpoint`, `alert`, `resync`, `bye`.
#[utoipa::path(get, path = "/jobs/{id}/events", tag = "jobs",
    params(("id" = String, Path), EventsQuery, ("Last-Event-ID" = Option<String>, Header)), responses(
    (status = 200, content_type = "text/event-stream", body = String), (status = 204, description = "the job is over and the client has everything"),
    (status = 400, body = ProblemDto), (status = 404, body = ProblemDto), (status = 406, body = ProblemDto), (status = 503, body = ProblemDto)))]
pub(super) async fn job_events(
    State(app): State<App>,
    Extension(figures): Extension<Arc<HttpFigures>>,
    Path(id): Path<String>,
    Query(query): Query<EventsQuery>,
    headers: HeaderMap,
) -> ApiResult<Response> {
    let accept = headers
        .get(header::ACCEPT)
        .and_then(|v| v.to_str().ok())
        .unwrap_or("*/*");
    if !["text/event-stream", "text/*", "*/*"]
        .iter()
        .any(|t| accept.contains(t))
    {
        return Err(ApiError::new(Code::NotAcceptable, "Available is text/event-stream."));
    }
    let job = app.store.job(job_id(&id)?).await?;
    let cursor = match (headers.get(LAST_EVENT_ID), query.after) {
        // A browser sends its header again and again; an error would make it loop, so garbage means "start anew".
        (Some(id), _) => Cursor::of(id.to_str().unwrap_or(""), job.last_seq),
        (None, Some(after)) => match Cursor::of(&after, job.last_seq) {
            Cursor::Unknown if after.parse::<u64>().is_err() => {
                return Err(ApiError::new(
                    Code::InvalidCursor,
                    "`after` must be the id of an event.",
                ));
            }
            cursor => cursor,
        },
        (None, None) => Cursor::Fresh,
    };
    if job.status.is_final() && cursor == Cursor::After(job.last_seq) {
        return Ok(StatusCode::NO_CONTENT.into_response());
    }
    let max_streams = app.config.server.max_streams;
    let Some(place) = Place::take(figures, max_streams) else {
        let detail = format!("{max_streams} streams are open.");
        return Err(ApiError::new(Code::TooManyStreams, detail).with_retry_after(5));
    };
    let feed = Feed::new(app, job, cursor, place).await?;
    let ping = Duration::from_millis(feed.app.config.server.sse_ping_ms);
    let events = stream::unfold(feed, async |mut feed| {
        feed.next().await.map(|event| (Ok::<_, Infallible>(event), feed))
    });
    let mut response = Sse::new(events)
        .keep_alive(KeepAlive::new().interval(ping).text("ping"))
        .into_response();
    let headers = response.headers_mut();
    headers.insert(
        header::CACHE_CONTROL,
        HeaderValue::from_static("no-cache, no-transform"),
    );
    headers.insert(X_ACCEL_BUFFERING, HeaderValue::from_static("no"));
    Ok(response)
}

/// What a client has seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cursor {
    /// Nothing: it gets a snapshot.
    Fresh,
    /// Everything up to this event.
    After(u64),
    /// Something that this job never sent: it must start anew.
    Unknown,
}

impl Cursor {
    fn of(text: &str, newest: u64) -> Self {
        match text.trim().parse::<u64>() {
            Ok(seq) if seq <= newest => Self::After(seq),
            _ => Self::Unknown,
        }
    }
}

/// One of the open streams; given back on drop.
#[derive(Debug)]
struct Place(Arc<HttpFigures>);

impl Place {
    fn take(figures: Arc<HttpFigures>, max_streams: u64) -> Option<Self> {
        let place = Self(figures);
        let before = place.0.streams.fetch_add(1, Ordering::Relaxed);
        (before < max_streams).then_some(place)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.streams.fetch_sub(1, Ordering::Relaxed);
    }
}

/// One viewer's stream.
struct Feed {
    app: App,
    job: Job,
    follower: Follower,
    /// To be sent before anything else.
    first: VecDeque<Event>,
    /// Set once the job is over: the stream ends when this event was sent.
    end_at: Option<u64>,
    done: bool,
    _place: Place,
}

impl Feed {
    async fn new(app: App, job: Job, cursor: Cursor, place: Place) -> ApiResult<Self> {
        let mut first = VecDeque::from([Event::default().retry(RETRY).comment("lorad job events")]);
        let after = match cursor {
            Cursor::After(seq) => seq,
            Cursor::Fresh | Cursor::Unknown => {
                if cursor == Cursor::Unknown {
                    let reason = "the cursor is not of this job's events; read the job's state again";
                    first.push_back(event("resync", &json!({"job_id": job.id, "reason": reason})));
                }
                let snapshot = serde_json::to_value(describe(&app, &job).await?).map_err(ApiError::internal)?;
                first.push_back(event("snapshot", &snapshot).id(job.last_seq.to_string()));
                job.last_seq
            }
        };
        let follower = app.events.follow(&app.store, job.id, after);
        let end_at = job.status.is_final().then_some(job.last_seq);
        Ok(Self {
            app,
            job,
            follower,
            first,
            end_at,
            done: false,
            _place: place,
        })
    }

    /// The next event; `None` ends the stream.
    async fn next(&mut self) -> Option<Event> {
        if let Some(event) = self.first.pop_front() {
            return Some(event);
        }
        if self.done {
            return None;
        }
        loop {
            if self.end_at.is_some_and(|end| self.follower.cursor() >= end) {
                return Some(self.bye("complete"));
            }
            let shutdown = self.app.shutdown.clone();
            let news = tokio::select! {
                biased;
                () = shutdown.cancelled() => return Some(self.bye("shutdown")),
                news = self.follower.next() => news,
            };
            match news {
                Ok(News::Event(event)) => return Some(self.stored(event).await),
                Ok(News::Progress(Some(progress))) if self.end_at.is_none() => {
                    let dto = ProgressDto::new(&progress, self.job.step, self.job.total_steps);
                    self.job.step = self.job.step.max(dto.step);
                    let data = serde_json::to_value(dto).unwrap_or_default();
                    return Some(event("progress", &self.with_job(data)));
                }
                Ok(News::Progress(_)) => {}
                // It has waited half a minute for the database and waits on: nothing is lost, and a viewer that comes again would only
                // wait at the end of the line.
                Err(error) if error.is_busy() => {}
                Err(error) => {
                    tracing::error!(job.id = %self.job.id, error = &error as &dyn std::error::Error, "an event stream ends");
                    return Some(self.bye("error"));
                }
            }
        }
    }

    fn bye(&mut self, reason: &str) -> Event {
        self.done = true;
        event("bye", &json!({"job_id": self.job.id, "reason": reason}))
    }

    fn with_job(&self, data: Value) -> Value {
        let mut object = Map::new();
        object.insert("job_id".to_owned(), self.job.id.to_string().into());
        if let Value::Object(data) = data {
            object.extend(data);
        }
        Value::Object(object)
    }

    async fn stored(&mut self, stored: JobEvent) -> Event {
        let mut data = self.with_job(stored.data);
        data["ts"] = rfc3339(stored.t_ms).into();
        match stored.kind {
            EventKind::Status => {
                let to = data["to"].as_str().and_then(JobStatus::parse);
                if to.is_some_and(JobStatus::is_final) && self.end_at.is_none() {
                    match self.app.store.job(self.job.id).await {
                        Ok(job) => self.end_at = Some(job.last_seq),
                        // Deleted meanwhile: nothing more comes.
                        Err(StoreError::NotFound { .. }) => self.end_at = Some(stored.seq),
                        Err(error) => {
                            tracing::error!(job.id = %self.job.id, error = &error as &dyn std::error::Error, "cannot read a job");
                            self.end_at = Some(stored.seq);
                        }
                    }
                }
            }
            EventKind::Log => data["n"] = stored.seq.into(),
            EventKind::Sample => {
                if let Some(file) = data["file"].as_str() {
                    data["url"] = file_url(self.job.id, file).into();
                }
            }
            EventKind::Metrics | EventKind::Checkpoint | EventKind::Alert => {}
        }
        event(stored.kind.as_str(), &data).id(stored.seq.to_string())
    }
}

/// JSON text holds no raw line break, so one `data:` line carries it.
fn event(name: &str, data: &Value) -> Event {
    Event::default().event(name).data(data.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cursors_from_the_future_and_garbage_mean_start_anew() {
        assert_eq!(Cursor::of("7", 9), Cursor::After(7));
        assert_eq!(Cursor::of("0", 9), Cursor::After(0));
        for text in ["10", "-1", "", "e-1", "99999999999999999999"] {
            assert_eq!(Cursor::of(text, 9), Cursor::Unknown, "{text}");
        }
    }
}
