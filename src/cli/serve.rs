//! `lorad serve`, and what `lorad demo` needs of it: starting the server from flags and waiting to be stopped.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};

use anyhow::{Context, Result};
use lorad::{
    config::Config,
    serve::{ServerHandle, serve},
    telemetry,
};
use tokio::signal::unix::{SignalKind, signal};

use super::{
    Exit,
    args::{Demo, Serve},
    config, runtime,
};

/// Runs the command.
pub(crate) fn run(args: &Serve) -> Result<Exit> {
    let mut flags = Vec::new();
    if let Some(bind) = args.bind {
        flags.push(("server.bind", bind.to_string()));
    }
    if args.insecure_no_auth {
        flags.push(("server.insecure_no_auth", "true".to_owned()));
    }
    if let Some(dir) = &args.static_dir {
        flags.push((
            "server.static_dir",
            dir.to_str().context("--static-dir: the path is not UTF-8")?.to_owned(),
        ));
    }
    let config = config::load(&args.settings, &flags)?;
    telemetry::init(&config.log);
    runtime()?.block_on(async {
        // Before anything slow, so that no signal is lost.
        let mut stop = Stop::new()?;
        let server = serve(config).await?;
        println!("{}", url(&server));
        stop.asked().await;
        server.shutdown().await;
        Ok(Exit::Ok)
    })
}

/// The settings of the demo: port 8080 of this machine, or a free one where that is taken.
pub(crate) fn demo_config(args: &Demo) -> Result<Config> {
    let settings = config::load(&args.settings, &[])?;
    let bind = args.bind.unwrap_or_else(|| {
        let wanted = settings.server.bind;
        let is_free = TcpListener::bind(wanted).is_ok();
        if is_free {
            wanted
        } else {
            SocketAddr::from((Ipv4Addr::LOCALHOST, 0))
        }
    });
    config::load(&args.settings, &[("server.bind", bind.to_string())])
}

/// Where a browser on this machine finds the server.
pub(crate) fn url(server: &ServerHandle) -> String {
    let address = server.address();
    if address.ip().is_unspecified() {
        format!("http://127.0.0.1:{}", address.port())
    } else {
        format!("http://{address}")
    }
}

/// Ctrl-C and SIGTERM.
pub(crate) struct Stop {
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
}

impl Stop {
    /// Takes the signals from now on.
    pub(crate) fn new() -> Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt()).context("listen for Ctrl-C")?,
            terminate: signal(SignalKind::terminate()).context("listen for SIGTERM")?,
        })
    }

    /// Waits for one of them.
    pub(crate) async fn asked(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}
