//! Starting and stopping a storage process's work.

use crate::StorageConfig;
use crate::directory::Directory;
use crate::fetch::Fetcher;
use crate::images::Images;
use crate::instances::Instances;
use crate::nbd::export::Exports;
use crate::nbd::server;
use crate::nbd::tls::{Identity, TlsError};
use crate::remote::Remotes;
use crate::server::{Store, serve};
use crate::volumes::Volumes;
use rustix::fs::{Mode, fchmod};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with,
};
use std::collections::HashMap;
use std::io;
use std::net::{Shutdown, SocketAddr};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::runtime::Runtime;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Most control connections at one time.
const CONTROL_CONNECTIONS_MAX: usize = 128;
const CONTROL_BACKLOG: i32 = 128;
const WORKERS: usize = 2;
/// How long stopping waits for work under way.
const STOP_MAX: Duration = Duration::from_secs(5);
/// How long to wait after the system refused to accept, for instance without free descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Why a storage process does not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The directory can't be made, read or written.
    #[error("use the storage directory: {path}", path = .path.display())]
    Directory {
        /// What could not be used.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Another process has locked it.
    #[error(
        "storage directory {path} is in use by another process: stop that one or choose another \
         directory", path = .path.display()
    )]
    DirectoryTaken {
        /// The directory.
        path: PathBuf,
    },
    /// It was made by another version.
    #[error("{path} is of version {version}, which this program does not read", path = .path.display())]
    Version {
        /// The file that says so.
        path: PathBuf,
        /// The version it names.
        version: u32,
    },
    /// It belongs to another cluster.
    #[error("{path} belongs to cluster {found:?}, not to this one", path = .path.display())]
    ForeignCluster {
        /// The file that says so.
        path: PathBuf,
        /// The cluster it names.
        found: String,
    },
    /// A PEM file can't be read.
    #[error("read {path}", path = .path.display())]
    ReadPem {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The identity can't be used.
    #[error("use the host's identity")]
    Tls(#[source] TlsError),
    /// The address for other hosts is every address.
    #[error("listen address {0} is a wildcard: name the one address that other hosts use")]
    Wildcard(SocketAddr),
    /// The address for other hosts can't be bound.
    #[error("listen on {address} for other hosts")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The control socket can't be bound.
    #[error("bind the control socket {path}", path = .path.display())]
    Control {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The runtime can't start.
    #[error("start the runtime")]
    Runtime(#[source] io::Error),
}

/// A storage process's work, under way until it is stopped or dropped.
pub struct Service {
    store: Arc<Store>,
    clients: Arc<Clients>,
    control: PathBuf,
    /// Taken when it stops.
    runtime: Option<Runtime>,
}

/// The control connections that are open.
#[derive(Default)]
struct Clients {
    open: Mutex<HashMap<u64, Connection>>,
}

struct Connection {
    /// To end it from outside.
    socket: UnixStream,
    /// Taken by whoever waits for its end.
    thread: Option<JoinHandle<()>>,
}

/// Does a storage process's work until SIGTERM or SIGINT. Takes an exclusive lock on the
/// directory; the guests' raw descriptors outlive it, their connections to other hosts do not.
pub fn run(config: StorageConfig) -> Result<(), StartError> {
    let service = Service::start(config)?;
    let stop = service.runtime.as_ref().map_or(Ok(()), |runtime| {
        runtime.block_on(async {
            let mut terminate = signal(SignalKind::terminate())?;
            let mut interrupt = signal(SignalKind::interrupt())?;
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            Ok(())
        })
    });
    service.stop();
    stop.map_err(StartError::Runtime)
}

impl Service {
    /// Starts; returns when both sockets accept.
    pub fn start(config: StorageConfig) -> Result<Self, StartError> {
        if config.listen.ip().is_unspecified() {
            return Err(StartError::Wildcard(config.listen));
        }
        let identity = Identity::new(&config.tls, &config.cluster_id).map_err(StartError::Tls)?;
        let directory = Arc::new(Directory::open(&config.directory, &config.cluster_id)?);
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(WORKERS)
            .thread_name("storage")
            .enable_all()
            .build()
            .map_err(StartError::Runtime)?;
        let listener = runtime
            .block_on(tokio::net::TcpListener::bind(config.listen))
            .map_err(|source| StartError::Listen { address: config.listen, source })?;
        let address = listener
            .local_addr()
            .map_err(|source| StartError::Listen { address: config.listen, source })?;
        let (store, exports) = open_store(&directory, &identity, &runtime, address)?;
        let control = bind_control(&config.control)
            .map_err(|source| StartError::Control { path: config.control.clone(), source })?;
        runtime.spawn(server::listen(listener, identity, exports));
        let clients = Arc::new(Clients::default());
        runtime.block_on(async {
            let control = tokio::net::UnixListener::from_std(control)
                .map_err(|source| StartError::Control { path: config.control.clone(), source })?;
            tokio::spawn(accept(control, store.clone(), clients.clone()));
            Ok(())
        })?;
        let measured = store.clone();
        runtime.spawn_blocking(move || measured.fdatasync_p50_us());
        tracing::info!(
            directory = %directory.path().display(),
            listen = %address,
            control = %config.control.display(),
            "storage serves"
        );
        Ok(Self { store, clients, control: config.control, runtime: Some(runtime) })
    }

    /// Where it listens for other hosts, with the port that was chosen.
    pub fn listen(&self) -> SocketAddr {
        self.store.listen
    }

    /// Stops serving and waits for what is under way; also done when dropped.
    pub fn stop(self) {
        drop(self);
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.store.stopping.store(true, Ordering::Relaxed);
        let _ = std::fs::remove_file(&self.control);
        self.clients.stop();
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_timeout(STOP_MAX);
        }
    }
}

fn open_store(
    directory: &Arc<Directory>,
    identity: &Identity,
    runtime: &Runtime,
    listen: SocketAddr,
) -> Result<(Arc<Store>, Exports), StartError> {
    let failed = |source| StartError::Directory { path: directory.path().to_owned(), source };
    let handle = runtime.handle();
    let images = Arc::new(Images::open(directory.clone()).map_err(failed)?);
    let volumes = Arc::new(Volumes::open(directory.clone(), handle.clone()).map_err(failed)?);
    let exports =
        Exports { images: images.clone(), volumes: volumes.clone(), epoch: directory.epoch() };
    let store = Store {
        directory: directory.clone(),
        instances: Instances::new(directory.clone(), images.clone()),
        fetcher: Fetcher::new(images.clone(), identity.clone(), handle.clone()),
        remotes: Remotes::new(identity.clone(), handle.clone()),
        images,
        volumes,
        instance: instance_name(),
        listen,
        fdatasync_p50_us: OnceLock::new(),
        stopping: AtomicBool::new(false),
    };
    Ok((Arc::new(store), exports))
}

/// Differs between any two starts on one host.
fn instance_name() -> String {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    format!("{:x}-{:x}", std::process::id(), since.as_nanos())
}

/// Binds with mode 0600 from the first moment. A socket that nobody answers at is replaced.
fn bind_control(path: &Path) -> io::Result<UnixListener> {
    if UnixStream::connect(path).is_ok() {
        let message = "another process answers there: stop it or choose another path";
        return Err(io::Error::new(io::ErrorKind::AddrInUse, message));
    }
    match std::fs::symlink_metadata(path) {
        Ok(found) if std::os::unix::fs::FileTypeExt::is_socket(&found.file_type()) => {
            std::fs::remove_file(path)?;
        }
        Ok(_) => return Err(io::Error::new(io::ErrorKind::AlreadyExists, "it is not a socket")),
        Err(_) => {}
    }
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    listen(&socket, CONTROL_BACKLOG)?;
    Ok(socket.into())
}

async fn accept(control: tokio::net::UnixListener, store: Arc<Store>, clients: Arc<Clients>) {
    let places = Arc::new(Semaphore::new(CONTROL_CONNECTIONS_MAX));
    for id in 0.. {
        // The semaphore is never closed.
        let Ok(place) = places.clone().acquire_owned().await else { return };
        let started = match control.accept().await {
            Ok((socket, _)) => clients.serve(id, socket, place, &store),
            Err(error) => Err(error),
        };
        if let Err(error) = started {
            tracing::warn!(%error, "accept a control connection");
            tokio::time::sleep(ACCEPT_PAUSE).await;
        }
    }
}

impl Clients {
    fn serve(
        self: &Arc<Self>,
        id: u64,
        socket: tokio::net::UnixStream,
        place: OwnedSemaphorePermit,
        store: &Arc<Store>,
    ) -> io::Result<()> {
        let socket = socket.into_std()?;
        socket.set_nonblocking(false)?;
        let handle = socket.try_clone()?;
        let (clients, store) = (self.clone(), store.clone());
        let mut open = self.open();
        if store.stopping.load(Ordering::Relaxed) {
            return Ok(());
        }
        let thread =
            std::thread::Builder::new().name("storage-control".to_owned()).spawn(move || {
                serve(&store, &socket);
                clients.open().remove(&id);
                drop(place);
            })?;
        open.insert(id, Connection { socket: handle, thread: Some(thread) });
        Ok(())
    }

    fn stop(&self) {
        let threads: Vec<_> = {
            let mut open = self.open();
            let close = |connection: &mut Connection| {
                let _ = connection.socket.shutdown(Shutdown::Both);
                connection.thread.take()
            };
            open.values_mut().filter_map(close).collect()
        };
        for thread in threads {
            let _ = thread.join();
        }
    }

    fn open(&self) -> MutexGuard<'_, HashMap<u64, Connection>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
