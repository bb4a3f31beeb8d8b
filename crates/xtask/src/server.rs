//! A lorad server for commands that need one: started from the release build, asked over HTTP, ended when dropped.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::TcpStream,
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::exec;

/// A running server.
pub(crate) struct Server {
    child: Child,
    /// `127.0.0.1:PORT`
    pub(crate) address: String,
}

impl Server {
    /// Builds the program and starts it on a data directory, with settings as environment variables.
    ///
    /// # Errors
    /// If it cannot be built or does not come up.
    pub(crate) fn start(root: &Path, data_dir: &Path, settings: &[(&str, &str)]) -> Result<Self> {
        exec::build_all()?;
        let mut child = Command::new(exec::target_dir(root).join("release/lorad"))
            .args(["serve", "--bind", "127.0.0.1:0"])
            .env("LORAD_STORAGE__DATA_DIR", data_dir)
            .env("LORAD_LOG__FILTER", "error")
            .envs(settings.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("start the server")?;
        let stdout = child.stdout.take().context("the server's stdout is piped")?;
        // From here on dropping it ends the process.
        let mut server = Self {
            child,
            address: String::new(),
        };
        let mut url = String::new();
        BufReader::new(stdout).read_line(&mut url)?;
        let Some(address) = url.trim().strip_prefix("http://") else {
            bail!("the server did not start: {url:?}");
        };
        address.clone_into(&mut server.address);
        Ok(server)
    }

    /// Whether it still runs.
    ///
    /// # Errors
    /// If the system does not say.
    pub(crate) fn is_up(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }

    /// A request and its JSON answer.
    ///
    /// # Errors
    /// If there is none, or its status is no success.
    pub(crate) fn ask(&self, method: &str, path: &str, body: Option<&Value>) -> Result<Value> {
        let body = body.map(Value::to_string).unwrap_or_default();
        let mut stream = TcpStream::connect(&self.address)?;
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        write!(
            stream,
            "{method} {path} HTTP/1.0\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").context("no answer")?;
        ensure!(head.contains(" 20"), "{method} {path}: {answer}");
        serde_json::from_str(body).with_context(|| format!("{method} {path}: {body}"))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself; either way it is waited for.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
