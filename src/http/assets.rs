//! The dashboard: files of `static/`, embedded in the binary, or read from a folder while it is being worked on.

use std::{borrow::Cow, path::Path};

use axum::{
    body::Body,
    extract::State,
    http::{HeaderMap, HeaderValue, Method, StatusCode, Uri, header},
    response::{IntoResponse as _, Response},
};
use rust_embed::RustEmbed;

use super::{
    dto,
    error::{ApiError, Code},
};
use crate::app::App;

#[derive(RustEmbed)]
#[folder = "static/"]
struct Embedded;

/// Serves the dashboard's files; everything else that has no route ends here too.
pub(super) async fn dashboard(State(app): State<App>, method: Method, uri: Uri, headers: HeaderMap) -> Response {
    let missing = || {
        ApiError::new(
            Code::RouteNotFound,
            format!("There is nothing at {}.", shown(uri.path())),
        )
        .into_response()
    };
    let path = uri.path().trim_start_matches('/');
    let path = if path.is_empty() { "index.html" } else { path };
    // Plain names only: no dots in front, no climbing, nothing percent-encoded; `static/` needs none of them.
    let plain = path
        .split('/')
        .all(|part| !part.is_empty() && !part.starts_with('.') && !part.contains(['\\', '%']));
    if !matches!(method, Method::GET | Method::HEAD) || !plain {
        return missing();
    }
    let dir = &app.config.server.static_dir;
    let bytes: Cow<'static, [u8]> = if dir.as_os_str().is_empty() {
        match Embedded::get(path) {
            Some(file) => file.data,
            None => return missing(),
        }
    } else {
        match from_disk(dir, path).await {
            Some(bytes) => bytes.into(),
            None => return missing(),
        }
    };
    let etag = dto::etag_of(&bytes);
    let mut response = if dto::lists_etag(&headers, header::IF_NONE_MATCH, &etag) == Some(true) {
        StatusCode::NOT_MODIFIED.into_response()
    } else {
        Body::from(bytes).into_response()
    };
    let guess = mime_guess::from_path(path).first_or_octet_stream();
    let media = if guess.type_() == "text" || guess.subtype() == "javascript" || guess.subtype() == "json" {
        format!("{}; charset=utf-8", guess.essence_str())
    } else {
        guess.essence_str().to_owned()
    };
    for (name, value) in [(header::CONTENT_TYPE, media), (header::ETAG, etag)] {
        if let Ok(value) = HeaderValue::from_str(&value) {
            response.headers_mut().insert(name, value);
        }
    }
    response
}

async fn from_disk(dir: &Path, path: &str) -> Option<Vec<u8>> {
    let root = tokio::fs::canonicalize(dir).await.ok()?;
    let file = tokio::fs::canonicalize(root.join(path)).await.ok()?;
    if !file.starts_with(&root) {
        return None; // a link that leads out
    }
    tokio::fs::read(file).await.ok()
}

fn shown(path: &str) -> String {
    path.chars().filter(|c| !c.is_control()).take(120).collect()
}
