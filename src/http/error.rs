//! Every error that the API can answer with: one table of code, status, title and hint, and RFC 9457 bodies.
//!
//! Handlers return [`ApiError`]. It is rendered by [`super::guard::request_context`], which knows the request's id.
//! There is no blanket conversion: each boundary's errors are mapped here, variant by variant.

use axum::{
    Json,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use lorad_proto::problem::{FieldError, Problem};
use serde::Serialize;
use serde_json::{Map, Value};

use crate::{ingest::IngestError, store::StoreError};

macro_rules! codes {
    ($($variant:ident = $code:literal, $status:ident, $title:literal, $hint:literal;)+) => {
        /// Stable codes; clients and the dashboard's translations go by them.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Code {
            $(#[doc = $title] $variant,)+
        }

        impl Code {
            /// Every code, for the documentation.
            pub const ALL: &[Self] = &[$(Self::$variant),+];

            fn row(self) -> (&'static str, StatusCode, &'static str, &'static str) {
                match self {
                    $(Self::$variant => ($code, StatusCode::$status, $title, $hint),)+
                }
            }
        }
    };
}

codes! {
    InvalidRequest = "request.invalid", UNPROCESSABLE_ENTITY, "The request has errors", "Each field at fault is listed in `errors`.";
    MalformedJson = "json.malformed", BAD_REQUEST, "The body is not valid JSON", "Check the body near the position given.";
    NotJson = "json.required", UNSUPPORTED_MEDIA_TYPE, "The content type is not supported here", "Send `Content-Type: application/json`.";
    Multipart = "multipart.malformed", BAD_REQUEST, "The multipart body cannot be read", "Send form data, e.g. `curl -F job=@job.json -F dataset=@pictures.zip`.";
    InvalidQuery = "query.invalid", BAD_REQUEST, "A query parameter is not valid", "";
    InvalidCursor = "cursor.invalid", BAD_REQUEST, "The cursor is not valid", "Use a cursor that the server gave, or none.";
    InvalidHeader = "header.invalid", BAD_REQUEST, "A header is not valid", "";
    AuthRequired = "auth.required", UNAUTHORIZED, "An API key is needed", "Send `Authorization: Bearer KEY`. `lorad keys create` on the server's machine makes a key.";
    AuthInvalid = "auth.invalid", UNAUTHORIZED, "The API key is not valid", "It may be mistyped, expired or revoked. `lorad keys list` on the server's machine shows the keys.";
    ScopeTooSmall = "auth.scope", FORBIDDEN, "The API key may not do this", "Use a key with a larger scope.";
    KeyNotFound = "key.not_found", NOT_FOUND, "No such key", "`GET /api-keys` lists the keys.";
    RateLimited = "rate.limited", TOO_MANY_REQUESTS, "Too many requests", "Wait as `Retry-After` says. `RateLimit-Limit` is the number of requests in a minute.";
    QuotaExceeded = "quota.exceeded", TOO_MANY_REQUESTS, "The key's quota is used up", "Wait until jobs have finished, delete what is not needed any more, or ask an administrator for more.";
    WebhookNotFound = "webhook.not_found", NOT_FOUND, "No such webhook", "`GET /webhooks` lists the webhooks.";
    DeliveryNotFound = "delivery.not_found", NOT_FOUND, "No such delivery", "`GET /webhooks/{id}/deliveries` lists them.";
    JobNotFound = "job.not_found", NOT_FOUND, "No such job", "`GET /jobs` lists the jobs.";
    DatasetNotFound = "dataset.not_found", NOT_FOUND, "No such dataset", "`GET /datasets` lists the datasets.";
    ModelNotFound = "model.not_found", NOT_FOUND, "No such model", "`GET /models` lists the models.";
    FamilyNotFound = "family.not_found", NOT_FOUND, "No such model family", "`GET /families` lists the families.";
    FileNotFound = "file.not_found", NOT_FOUND, "No such file", "`GET /jobs/{id}/files` lists the files.";
    RouteNotFound = "route.not_found", NOT_FOUND, "There is nothing at this address", "`GET /openapi.json` lists every address.";
    MethodNotAllowed = "method.not_allowed", METHOD_NOT_ALLOWED, "The method is not supported here", "The `Allow` header lists the methods.";
    NotAcceptable = "accept.unsupported", NOT_ACCEPTABLE, "None of the accepted types is available", "";
    ActionNotAllowed = "job.action_not_allowed", CONFLICT, "The job's state does not allow this", "`allowed` lists what is possible now.";
    InUse = "resource.in_use", CONFLICT, "Something else still needs it", "Delete what uses it first; a job must have ended for that.";
    Exists = "resource.exists", CONFLICT, "The id is taken", "Choose another id.";
    Builtin = "resource.builtin", CONFLICT, "It comes with the server", "Built-in models and datasets cannot be deleted.";
    IdempotencyInFlight = "idempotency.in_flight", CONFLICT, "The first request with this key is still at work", "Wait, then send the same request again.";
    IdempotencyOtherBody = "idempotency.other_body", UNPROCESSABLE_ENTITY, "The key was used with another request", "Use a new Idempotency-Key for a new request.";
    PreconditionFailed = "precondition.failed", PRECONDITION_FAILED, "The resource has changed", "Read it again, then repeat the change.";
    RangeNotSatisfiable = "range.not_satisfiable", RANGE_NOT_SATISFIABLE, "The range lies outside the file", "";
    BodyTooLarge = "body.too_large", PAYLOAD_TOO_LARGE, "The request body is too large", "`GET /version` lists the limits.";
    UriTooLong = "uri.too_long", URI_TOO_LONG, "The address is too long", "";
    Timeout = "request.timeout", REQUEST_TIMEOUT, "The request took too long", "Send the body without long pauses.";
    HostNotAllowed = "host.not_allowed", FORBIDDEN, "The Host header is not on the allow-list", "Use localhost, an IP address, or add the name to `server.allowed_hosts` in the configuration.";
    OriginNotAllowed = "origin.not_allowed", FORBIDDEN, "Requests from other sites are refused", "Open the dashboard from this server's own address.";
    DatasetRefused = "dataset.refused", UNPROCESSABLE_ENTITY, "The dataset is refused", "Fix or remove the listed files and upload again. Nothing was stored.";
    DatasetTooLarge = "dataset.too_large", PAYLOAD_TOO_LARGE, "The dataset is too large", "Upload fewer or smaller pictures.";
    DatasetNotAnArchive = "dataset.not_an_archive", UNSUPPORTED_MEDIA_TYPE, "Not a supported archive", "Upload a .zip, .tar or .tar.gz file.";
    BaseModelUnfit = "base_model.unfit", UNPROCESSABLE_ENTITY, "The base model cannot be used", "";
    HubRefused = "hub.refused", UNPROCESSABLE_ENTITY, "The hub's model cannot be used", "";
    HubUnreachable = "hub.unreachable", BAD_GATEWAY, "The hub cannot be reached", "";
    ModelPathNotAllowed = "model.path_not_allowed", FORBIDDEN, "The folder is outside the allowed roots", "Add its parent to `models.roots` in the configuration.";
    MemoryTooSmall = "memory.too_small", UNPROCESSABLE_ENTITY, "The job does not fit into memory", "Lower batch_size or resolution, or turn gradient_checkpointing on.";
    StorageFull = "storage.full", INSUFFICIENT_STORAGE, "The server's disk is full", "Free space in the data directory, then try again.";
    TooManyStreams = "streams.too_many", SERVICE_UNAVAILABLE, "Too many event streams are open", "Close some, then try again.";
    QueueFull = "queue.full", TOO_MANY_REQUESTS, "The queue is full", "Wait until jobs have finished, or cancel some.";
    NotReady = "server.not_ready", SERVICE_UNAVAILABLE, "The server is not ready", "";
    Busy = "server.busy", SERVICE_UNAVAILABLE, "The server has more to do than it can", "Wait as `Retry-After` says, then try again.";
    ShuttingDown = "server.shutting_down", SERVICE_UNAVAILABLE, "The server is shutting down", "Try again in a moment.";
    Internal = "internal", INTERNAL_SERVER_ERROR, "The server hit an unexpected error", "The server's log has the details under the request id.";
}

impl Code {
    /// Its stable spelling.
    pub fn as_str(self) -> &'static str {
        self.row().0
    }

    /// Its HTTP status.
    pub fn status(self) -> StatusCode {
        self.row().1
    }

    /// The same for every occurrence.
    pub fn title(self) -> &'static str {
        self.row().2
    }

    /// What the client can do, in general; may be empty.
    pub fn hint(self) -> &'static str {
        self.row().3
    }
}

/// An error answer. Boxed inside: errors travel through every handler's `Result`.
#[derive(Debug)]
pub struct ApiError(Box<Inner>);

#[derive(Debug)]
struct Inner {
    code: Code,
    /// Overrides the table's words: a trainer's or the ingest's own problem.
    problem: Problem,
    /// Further members of the body.
    extra: Map<String, Value>,
    retry_after_s: Option<u32>,
    /// For the log, never for the client.
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// Result of a handler.
pub type ApiResult<T> = Result<T, ApiError>;

impl ApiError {
    /// An error with what happened this time.
    pub fn new(code: Code, detail: impl Into<String>) -> Self {
        Self(Box::new(Inner {
            code,
            problem: Problem::new(code.as_str(), code.title(), detail).with_hint(code.hint()),
            extra: Map::new(),
            retry_after_s: None,
            source: None,
        }))
    }

    /// An error whose code, title, detail and hint come from a [`Problem`]; `code` gives the status.
    pub fn with_problem(code: Code, problem: Problem) -> Self {
        let mut error = Self::new(code, "");
        error.0.problem = problem;
        error
    }

    /// Field errors, all at once.
    pub fn fields(errors: Vec<FieldError>) -> Self {
        let detail = match errors.as_slice() {
            [one] => format!("{}: {}", one.pointer, one.detail),
            many => format!("{} fields are at fault.", many.len()),
        };
        let mut error = Self::new(Code::InvalidRequest, detail);
        error.0.problem.errors = errors;
        error
    }

    /// Something that must not happen; the client learns nothing but the request id.
    pub fn internal(source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        let mut error = Self::new(Code::Internal, "");
        error.0.source = Some(source.into());
        error
    }

    /// Adds the field errors of another error, so that all come at once; one without field errors is left out.
    #[must_use]
    pub fn and_fields_of(mut self, other: Self) -> Self {
        self.0.problem.errors.extend(other.0.problem.errors);
        self
    }

    /// Adds a member to the body.
    #[must_use]
    pub fn with_extra(mut self, name: &str, value: impl Serialize) -> Self {
        self.0
            .extra
            .insert(name.to_owned(), serde_json::to_value(value).unwrap_or(Value::Null));
        self
    }

    /// Says when to try again.
    #[must_use]
    pub fn with_retry_after(mut self, seconds: u32) -> Self {
        self.0.retry_after_s = Some(seconds);
        self
    }

    /// The HTTP status.
    pub fn status(&self) -> StatusCode {
        self.0.code.status()
    }

    /// Logs what the client does not learn. Called once, where the error is rendered.
    fn log(&self, request_id: &str) {
        let Some(source) = &self.0.source else { return };
        let mut chain = source.to_string();
        let mut next = source.source();
        while let Some(error) = next {
            chain.push_str(": ");
            chain.push_str(&error.to_string());
            next = error.source();
        }
        tracing::error!(
            request.id = request_id,
            code = self.0.code.as_str(),
            error = chain,
            "request failed"
        );
    }

    /// The response body and headers, under a request id.
    pub(super) fn render(&self, request_id: &str) -> Response {
        self.log(request_id);
        let mut body = Map::new();
        let mut put = |name: &str, value: Value| body.insert(name.to_owned(), value);
        let detail = if self.0.problem.detail.is_empty() {
            "Nothing more is known here; the server's log has the details.".to_owned()
        } else {
            self.0.problem.detail.clone()
        };
        put("type", format!("/errors/{}", self.0.problem.code).into());
        put("title", self.0.problem.title.clone().into());
        put("status", self.status().as_u16().into());
        put("detail", detail.into());
        put("instance", format!("/requests/{request_id}").into());
        put("code", self.0.problem.code.clone().into());
        if !self.0.problem.hint.is_empty() {
            put("hint", self.0.problem.hint.clone().into());
        }
        if !self.0.problem.errors.is_empty() {
            put(
                "errors",
                serde_json::to_value(&self.0.problem.errors).unwrap_or_default(),
            );
        }
        put("request_id", request_id.into());
        body.extend(self.0.extra.clone());
        let mut response = (self.status(), Json(body)).into_response();
        let headers = response.headers_mut();
        headers.insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/problem+json"),
        );
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        // RFC 6750: how to come in, and what was wrong with the try.
        let challenge = match self.0.code {
            Code::AuthRequired => Some("Bearer realm=\"lorad\""),
            Code::AuthInvalid => Some("Bearer realm=\"lorad\", error=\"invalid_token\""),
            Code::ScopeTooSmall => Some("Bearer realm=\"lorad\", error=\"insufficient_scope\""),
            _ => None,
        };
        if let Some(challenge) = challenge {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static(challenge));
        }
        if let Some(seconds) = self.0.retry_after_s {
            headers.insert(header::RETRY_AFTER, seconds.into());
        }
        response
    }
}

/// Carries an [`ApiError`] to the middleware that renders it.
#[derive(Clone)]
pub(super) struct Unrendered(pub(super) std::sync::Arc<ApiError>);

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = self.status().into_response();
        response.extensions_mut().insert(Unrendered(std::sync::Arc::new(self)));
        response
    }
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::NotFound { what, ref id } => {
                let code = match what {
                    "job" => Code::JobNotFound,
                    "dataset" => Code::DatasetNotFound,
                    "model" => Code::ModelNotFound,
                    "file" => Code::FileNotFound,
                    "key" => Code::KeyNotFound,
                    "webhook" => Code::WebhookNotFound,
                    "delivery" => Code::DeliveryNotFound,
                    _ => Code::InvalidRequest,
                };
                Self::new(code, format!("There is no {what} {id}."))
            }
            StoreError::Exists { what, ref id } => Self::new(Code::Exists, format!("The {what} {id} exists already.")),
            StoreError::InUse { what, ref id, ref by } => {
                Self::new(Code::InUse, format!("The {what} {id} is used by {by}."))
            }
            StoreError::Quota { what, limit, used } => Self::new(
                Code::QuotaExceeded,
                format!("The key has {used} {what}; it may have {limit}."),
            )
            .with_retry_after(60),
            StoreError::NotAllowed { job, status, action } => Self::new(
                Code::ActionNotAllowed,
                format!("{job} is {status}: {action} is not possible."),
            )
            .with_extra("allowed", status.actions())
            .with_extra("status", status),
            error if error.is_busy() => {
                Self::new(Code::Busy, "The database was not free for half a minute.").with_retry_after(10)
            }
            error if error.is_disk_full() => {
                let mut answer = Self::new(Code::StorageFull, "The database could not grow.");
                answer.0.source = Some(Box::new(error));
                answer
            }
            StoreError::Illegal { .. }
            | StoreError::Fenced { .. }
            | StoreError::Open { .. }
            | StoreError::Migrate(_)
            | StoreError::Newer { .. }
            | StoreError::TooOld { .. }
            | StoreError::Corrupt { .. }
            | StoreError::Query { .. } => Self::internal(error),
        }
    }
}

impl ApiError {
    /// The ingest's verdict. `prefix`: pointer of the uploaded part, e.g. `/file`.
    pub fn ingest(error: IngestError, prefix: &str) -> Self {
        match error {
            IngestError::Refused(refusal) => {
                let mut problem = refusal.problem;
                for error in &mut problem.errors {
                    error.pointer.insert_str(0, prefix);
                }
                let code = match problem.code.as_str() {
                    "dataset.too_large" | "dataset.too_many_entries" => Code::DatasetTooLarge,
                    "dataset.not_an_archive" => Code::DatasetNotAnArchive,
                    _ => Code::DatasetRefused,
                };
                Self::with_problem(code, problem).with_extra("report", &refusal.report)
            }
            IngestError::Io { ref source, .. } if source.kind() == std::io::ErrorKind::StorageFull => {
                Self::new(Code::StorageFull, "The dataset does not fit on the disk.")
            }
            IngestError::Io { .. } | IngestError::Inspector(_) => Self::internal(error),
        }
    }

    /// What the disk did to a file that the server writes.
    pub(super) fn write(error: std::io::Error) -> Self {
        if error.kind() == std::io::ErrorKind::StorageFull {
            Self::new(Code::StorageFull, "The upload does not fit on the disk.")
        } else {
            Self::internal(error)
        }
    }
}

/// RFC 9457, for the API's documentation.
#[derive(Debug, Serialize, utoipa::ToSchema)]
#[schema(as = Problem)]
pub struct ProblemDto {
    /// `/errors/<code>`
    pub r#type: String,
    /// The same for every occurrence of `code`.
    pub title: String,
    /// HTTP status; not part of a failed job's `error`.
    pub status: u16,
    /// What happened this time.
    pub detail: String,
    /// `/requests/<request id>`
    pub instance: String,
    /// Stable; see the list in the API's description.
    pub code: String,
    /// What to do about it.
    pub hint: Option<String>,
    /// Every field or file at fault.
    pub errors: Option<Vec<FieldErrorDto>>,
    /// Also in the header `X-Request-Id`.
    pub request_id: String,
}

/// One thing wrong with one field, or with one file of an upload.
#[derive(Debug, Serialize, utoipa::ToSchema)]
#[schema(as = FieldError)]
pub struct FieldErrorDto {
    /// JSON pointer into the request; for an upload: `/<part>/<entry name>`.
    pub pointer: String,
    /// Stable code.
    pub code: String,
    /// One sentence.
    pub detail: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_unique_and_every_one_has_a_title() {
        let mut seen = std::collections::HashSet::new();
        for code in Code::ALL {
            assert!(seen.insert(code.as_str()), "{} stands twice", code.as_str());
            assert!(!code.title().is_empty() && code.status().as_u16() >= 400);
        }
    }

    #[test]
    fn a_database_that_is_not_free_is_no_fault_of_the_server() {
        let error = ApiError::from(StoreError::Query {
            act: "read",
            source: sqlx::Error::PoolTimedOut,
        });
        assert_eq!((error.0.code, error.0.retry_after_s), (Code::Busy, Some(10)));
        let error = ApiError::from(StoreError::Query {
            act: "read",
            source: sqlx::Error::WorkerCrashed,
        });
        assert_eq!(error.0.code, Code::Internal);
    }
}
