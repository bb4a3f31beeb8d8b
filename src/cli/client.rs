//! A small client of the HTTP API, for the commands that talk to a server.

use anyhow::{Context, Result, bail};
use futures_util::StreamExt;
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue};
use serde_json::Value;

use super::{Exit, runtime};

/// One server.
#[derive(Debug, Clone)]
pub(crate) struct Client {
    http: reqwest::Client,
    base: String,
}

/// One server-sent event.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct ServerEvent {
    /// `event:`.
    pub(crate) name: String,
    /// `data:`, parsed.
    pub(crate) data: Value,
}

impl Client {
    /// For the server at `base`, e.g. `http://127.0.0.1:8080`, with the key in `LORAD_API_KEY` if there is one.
    pub(crate) fn new(base: &str) -> Result<Self> {
        let mut headers = HeaderMap::new();
        if let Ok(key) = std::env::var("LORAD_API_KEY") {
            let mut value = HeaderValue::from_str(&format!("Bearer {}", key.trim()))
                .context("LORAD_API_KEY holds characters that no key has")?;
            value.set_sensitive(true);
            headers.insert(AUTHORIZATION, value);
        }
        let builder = || reqwest::Client::builder().no_proxy().default_headers(headers.clone());
        Ok(Self {
            // A machine without certificates can still talk to a server beside it.
            http: builder()
                .build()
                .or_else(|_| builder().tls_certs_only([]).build())
                .context("make an HTTP client")?,
            base: base.trim_end_matches('/').to_owned(),
        })
    }

    /// GET, as JSON.
    pub(crate) async fn get(&self, path: &str) -> Result<Value> {
        Ok(self
            .answer("GET", path, self.http.get(self.url(path)))
            .await?
            .json()
            .await?)
    }

    /// GET, as bytes.
    pub(crate) async fn bytes(&self, path: &str) -> Result<Vec<u8>> {
        Ok(self
            .answer("GET", path, self.http.get(self.url(path)))
            .await?
            .bytes()
            .await?
            .to_vec())
    }

    /// POST of JSON, answered with JSON.
    pub(crate) async fn post(&self, path: &str, body: &Value) -> Result<Value> {
        Ok(self
            .answer("POST", path, self.http.post(self.url(path)).json(body))
            .await?
            .json()
            .await?)
    }

    /// Hands every event of a job's stream to `on_event` until that returns `false`, reconnecting where it broke off.
    pub(crate) async fn follow(&self, path: &str, mut on_event: impl FnMut(ServerEvent) -> Result<bool>) -> Result<()> {
        let mut parser = EventParser::default();
        loop {
            let mut request = self.http.get(self.url(path)).header("accept", "text/event-stream");
            if let Some(id) = &parser.last_id {
                request = request.header("last-event-id", id);
            }
            let answer = self.answer("GET", path, request).await?;
            // 204: everything has been seen.
            if answer.status().as_u16() == 204 {
                return Ok(());
            }
            parser.restart();
            let mut body = answer.bytes_stream();
            while let Some(Ok(chunk)) = body.next().await {
                for event in parser.push(&chunk) {
                    if !on_event(event)? {
                        return Ok(());
                    }
                }
            }
            tokio::time::sleep(std::time::Duration::from_millis(300)).await;
        }
    }

    fn url(&self, path: &str) -> String {
        format!("{}{path}", self.base)
    }

    async fn answer(&self, method: &str, path: &str, request: reqwest::RequestBuilder) -> Result<reqwest::Response> {
        let response = request
            .send()
            .await
            .with_context(|| format!("{method} {}", self.url(path)))?;
        if response.status().is_success() {
            return Ok(response);
        }
        let status = response.status();
        let body = response.text().await.unwrap_or_default();
        match serde_json::from_str::<lorad_proto::problem::Problem>(&body) {
            Ok(problem) => Err(problem.into()),
            Err(_) => bail!("{method} {path}: {status}: {body}"),
        }
    }
}

/// Cuts a stream of bytes into server-sent events.
#[derive(Debug, Default)]
struct EventParser {
    buffer: Vec<u8>,
    name: String,
    data: String,
    last_id: Option<String>,
}

impl EventParser {
    /// Forgets what a broken connection left half sent.
    fn restart(&mut self) {
        self.buffer.clear();
        self.name.clear();
        self.data.clear();
    }

    fn push(&mut self, chunk: &[u8]) -> Vec<ServerEvent> {
        self.buffer.extend_from_slice(chunk);
        let mut events = Vec::new();
        while let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.buffer.drain(..=end).collect();
            let line = String::from_utf8_lossy(&line);
            self.line(line.trim_end_matches(['\r', '\n']), &mut events);
        }
        events
    }

    fn line(&mut self, line: &str, events: &mut Vec<ServerEvent>) {
        if line.is_empty() {
            let (name, data) = (std::mem::take(&mut self.name), std::mem::take(&mut self.data));
            if !data.is_empty() {
                let data = serde_json::from_str(&data).unwrap_or(Value::String(data));
                events.push(ServerEvent { name, data });
            }
            return;
        }
        let (field, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "event" => value.clone_into(&mut self.name),
            "id" => self.last_id = Some(value.to_owned()),
            "data" if self.data.is_empty() => value.clone_into(&mut self.data),
            "data" => {
                self.data.push('\n');
                self.data.push_str(value);
            }
            // A comment (empty field) or `retry`.
            _ => {}
        }
    }
}

/// `lorad healthcheck`.
pub(crate) fn healthcheck(url: &str) -> Result<Exit> {
    let client = Client::new(url)?;
    runtime()?.block_on(async {
        tokio::time::timeout(std::time::Duration::from_secs(5), client.get("/readyz"))
            .await
            .with_context(|| format!("no answer from {url} within 5 s"))?
    })?;
    println!("ready");
    Ok(Exit::Ok)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn events_are_read_whatever_the_chunks() {
        let stream = b": ping\n\nid: 7\nevent: status\ndata: {\"to\":\ndata: \"running\"}\n\nevent: bye\ndata: {}\n\n";
        for size in [1, 3, stream.len()] {
            let mut parser = EventParser::default();
            let events: Vec<_> = stream.chunks(size).flat_map(|chunk| parser.push(chunk)).collect();
            assert_eq!(events.len(), 2);
            assert_eq!(events[0].name, "status");
            assert_eq!(events[0].data, json!({"to": "running"}));
            assert_eq!(parser.last_id.as_deref(), Some("7"));
        }
    }

    #[test]
    fn a_broken_connection_leaves_no_half_event_behind() {
        let mut parser = EventParser::default();
        assert!(parser.push(b"event: status\ndata: {\"to\"").is_empty());
        parser.restart();
        let events = parser.push(b"event: bye\ndata: {}\n\n");
        assert_eq!(events[0].name, "bye");
    }
}
