//! The whole server, wired: lock, database, bundled content, scheduler, the workers' socket, the public listener.
//!
//! Called by the command line (`serve`, `demo`) and by tests; port 0 gives a free port.

use std::{
    fs::File,
    io::{Read as _, Write as _},
    net::SocketAddr,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tokio::{
    net::{TcpListener, UnixListener},
    sync::Notify,
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;

use crate::{
    agent_api::{self, AgentApi, Heard},
    app::{App, DataDir},
    blobs::{self, BlobError, Blobs},
    builtin::{self, BuiltinError},
    config::{Auth, Config},
    downloads::{self, Downloads},
    events::Events,
    executor::local::LocalExecutor,
    scheduler::{self, Scheduler},
    space::Ballast,
    store::{Store, StoreError},
    traces::{Traces, TracesError},
    trainer::TrainerCatalog,
    webhooks::Webhooks,
};

/// Longest path of a Unix socket; the system's limit is 108 bytes with its end mark on Linux, 104 elsewhere.
const SOCKET_PATH_MAX: usize = 103;

/// Why the server did not start.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The data directory cannot be used.
    #[error("cannot use the data directory {path}")]
    DataDir {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Another server runs on it.
    #[error("another lorad server{} runs on {path}; give this one its own --data-dir, or stop that one", owner.map_or(String::new(), |pid| format!(" (process {pid})")))]
    Locked {
        /// The data directory.
        path: PathBuf,
        /// The other server's process, if it wrote it down.
        owner: Option<u32>,
    },
    /// The path of the workers' socket is too long for the system.
    #[error("{path} is too long for a socket ({} bytes, at most {SOCKET_PATH_MAX}); choose a shorter --data-dir", path.as_os_str().len())]
    SocketPath {
        /// The socket.
        path: PathBuf,
    },
    /// The listener could not be opened.
    #[error("cannot listen on {address}")]
    Listen {
        /// Where.
        address: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Everyone who reaches the address could do everything.
    #[error(
        "refusing to listen on {0} without API keys: everyone who reaches it could read and delete everything. Make a key \
         (`lorad keys create --name me --scope admin` with the same --data-dir), bind to 127.0.0.1, or say \
         --insecure-no-auth if something else guards it"
    )]
    Exposed(SocketAddr),
    /// The client that calls webhooks cannot be made.
    #[error("cannot make the client that calls webhooks")]
    Webhooks(#[source] reqwest::Error),
    /// The program to run as worker was not found.
    #[error("cannot find this program's own file to start workers from")]
    WorkerProgram(#[source] std::io::Error),
    /// The database failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The published files cannot be used.
    #[error(transparent)]
    Blobs(#[from] BlobError),
    /// The bundled model cannot be used.
    #[error(transparent)]
    Builtin(#[from] BuiltinError),
    /// The collector of traces cannot be used.
    #[error(transparent)]
    Traces(#[from] TracesError),
}

/// A running server. Dropping it leaves it running until its runtime ends; end it with [`ServerHandle::shutdown`].
#[derive(Debug)]
pub struct ServerHandle {
    address: SocketAddr,
    app: App,
    tasks: Vec<JoinHandle<()>>,
    socket: PathBuf,
    /// Held while the server runs.
    _lock: File,
}

impl ServerHandle {
    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What its handlers hold.
    pub fn app(&self) -> &App {
        &self.app
    }

    /// Ends it: streams end, open requests get their grace, the database is closed. Workers train on; the next server on
    /// the same data directory takes them over.
    pub async fn shutdown(self) {
        self.app.shutdown.cancel();
        let grace = Duration::from_millis(self.app.config.server.shutdown_grace_ms);
        for task in self.tasks {
            let abort = task.abort_handle();
            if tokio::time::timeout(grace, task).await.is_err() {
                abort.abort();
            }
        }
        if let Err(error) = std::fs::remove_file(&self.socket) {
            tracing::warn!(%error, "the workers' socket was not removed");
        }
        self.app.store.close().await;
        self.app.traces.shutdown().await;
        tracing::info!("the server has ended; its workers train on");
    }
}

/// Starts the server.
///
/// # Errors
/// Everything that makes it useless: see [`ServeError`].
pub async fn serve(config: Config) -> Result<ServerHandle, ServeError> {
    let traces = Traces::start(&config.traces)?;
    let data = prepare_data_dir(&config.storage.data_dir)?;
    let lock = lock(&data)?;
    let store = Store::open(&data.database()).await?;
    store.settle_in(&data.root()).await?;
    store.abandon_cut_off_requests().await?;
    let server = &config.server;
    let guarded = server.insecure_no_auth || server.auth == Auth::Required || store.has_keys().await?;
    if !server.bind.ip().is_loopback() && !guarded {
        return Err(ServeError::Exposed(server.bind));
    }
    blobs::sweep_staging(&data.artifacts()).map_err(|source| ServeError::DataDir {
        path: data.artifacts(),
        source,
    })?;
    let storage = &config.storage;
    let app = App {
        ballast: Arc::new(Ballast::new(
            data.ballast(),
            storage.ballast_bytes,
            storage.min_free_bytes,
        )),
        blobs: Blobs::local(&data.artifacts(), config.storage.fsync)?,
        config: Arc::new(config),
        data: Arc::new(data),
        store,
        events: Events::default(),
        catalog: Arc::new(TrainerCatalog),
        downloads: Downloads::default(),
        traces,
        wake: Arc::new(Notify::new()),
        shutdown: CancellationToken::new(),
    };
    if let Err(error) = app.ballast.keep() {
        tracing::warn!(%error, "the ballast file was not made");
    }
    // Bound before anything slow, so that a taken port is an error at once and early clients wait instead of failing.
    let listener = listen(app.config.server.bind).await?;
    let address = listener.local_addr().map_err(|source| ServeError::Listen {
        address: app.config.server.bind.to_string(),
        source,
    })?;
    prepare_content(&app).await?;
    scheduler::sweep(&app).await;
    let mut tasks = start_jobs(&app)?;
    downloads::resume(&app).await?;
    let webhooks = Webhooks::new(app.clone()).map_err(ServeError::Webhooks)?;
    tasks.push(tokio::spawn(webhooks.run()));
    tasks.push(spawn_public(&app, listener));
    tracing::info!(%address, data_dir = %app.data.root().display(), "the server is up");
    Ok(ServerHandle {
        address,
        socket: app.data.agent_socket(),
        app,
        tasks,
        _lock: lock,
    })
}

fn prepare_data_dir(root: &Path) -> Result<DataDir, ServeError> {
    let at = |source| ServeError::DataDir {
        path: root.to_owned(),
        source,
    };
    std::fs::create_dir_all(root).map_err(at)?;
    // Absolute and without links: workers get these paths and run in another directory.
    let data = DataDir::new(root.canonicalize().map_err(at)?);
    for dir in [
        data.models(),
        data.datasets(),
        data.jobs(),
        data.artifacts(),
        data.tmp(),
    ] {
        std::fs::create_dir_all(dir).map_err(at)?;
    }
    Ok(data)
}

/// Takes the data directory for this process. The lock goes with the process, however it ends.
fn lock(data: &DataDir) -> Result<File, ServeError> {
    let at = |source| ServeError::DataDir {
        path: data.lock(),
        source,
    };
    let mut file = File::options()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .open(data.lock())
        .map_err(at)?;
    match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => {
            let mut owner = String::new();
            file.read_to_string(&mut owner).map_err(at)?;
            return Err(ServeError::Locked {
                path: data.root(),
                owner: owner.trim().parse().ok(),
            });
        }
        Err(error) => return Err(at(error.into())),
    }
    // Only for the message above: a full disk must not keep a server from starting.
    let note = file
        .set_len(0)
        .and_then(|()| file.write_all(format!("{}\n", std::process::id()).as_bytes()));
    if let Err(error) = note {
        tracing::warn!(%error, "the lock file does not name this process");
    }
    Ok(file)
}

async fn listen(bind: SocketAddr) -> Result<TcpListener, ServeError> {
    TcpListener::bind(bind).await.map_err(|source| ServeError::Listen {
        address: bind.to_string(),
        source,
    })
}

/// The bundled base model and dataset.
async fn prepare_content(app: &App) -> Result<(), ServeError> {
    let models = app.data.models();
    let unpacked = tokio::task::spawn_blocking(move || builtin::unpack(&models)).await;
    let path = unpacked.unwrap_or_else(|panic| {
        Err(BuiltinError::Unpack {
            path: app.data.models(),
            source: std::io::Error::other(panic),
        })
    })?;
    match builtin::register(&app.store, app.catalog.as_ref(), path).await {
        Ok(_) => {}
        // A build without trainer serves what is there; it only cannot start jobs.
        Err(BuiltinError::Inspect(problem)) if app.catalog.families().is_empty() => {
            tracing::warn!(code = problem.code, "no base model is registered: {}", problem.detail);
        }
        Err(error) => return Err(error.into()),
    }
    // A server without its bundled dataset is of use; one that cannot write to its data directory has failed above.
    if let Err(error) = crate::ingest::library::start(app).await {
        tracing::error!(
            error = &error as &dyn std::error::Error,
            "the bundled dataset is not ready"
        );
    }
    Ok(())
}

/// The scheduler and the workers' socket.
fn start_jobs(app: &App) -> Result<Vec<JoinHandle<()>>, ServeError> {
    let settings = &app.config.scheduler;
    let program = if settings.worker_program.as_os_str().is_empty() {
        std::env::current_exe().map_err(ServeError::WorkerProgram)?
    } else {
        settings.worker_program.clone()
    };
    let api = AgentApi {
        app: app.clone(),
        heard: Heard::default(),
    };
    let socket = listen_to_workers(&app.data.agent_socket())?;
    let executor = LocalExecutor::new(program, settings.devices.clone(), app.wake.clone());
    let scheduler = Scheduler::new(app.clone(), api.clone(), Arc::new(executor));
    let shutdown = app.shutdown.clone();
    let agents = tokio::spawn(async move {
        let server = axum::serve(socket, agent_api::router(api)).with_graceful_shutdown(shutdown.cancelled_owned());
        if let Err(error) = server.await {
            tracing::error!(%error, "the workers' socket failed");
        }
    });
    Ok(vec![tokio::spawn(scheduler.run()), agents])
}

fn listen_to_workers(path: &Path) -> Result<UnixListener, ServeError> {
    if path.as_os_str().len() > SOCKET_PATH_MAX {
        return Err(ServeError::SocketPath { path: path.to_owned() });
    }
    let at = |source| ServeError::Listen {
        address: path.display().to_string(),
        source,
    };
    // Left by a server that was killed; the lock says that none is alive.
    match std::fs::remove_file(path) {
        Ok(()) => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(at(error)),
    }
    let listener = UnixListener::bind(path).map_err(at)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(at)?;
    Ok(listener)
}

fn spawn_public(app: &App, listener: TcpListener) -> JoinHandle<()> {
    let router = crate::http::router(app.clone());
    let header_timeout = Duration::from_millis(app.config.server.header_timeout_ms);
    tokio::spawn(crate::http::listen::run(
        listener,
        router,
        header_timeout,
        app.shutdown.clone(),
    ))
}
