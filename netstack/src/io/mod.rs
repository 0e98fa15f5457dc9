//! Everything that touches a descriptor: the data-plane thread ([`plane`]), the guests' rings
//! ([`wires`]), forwards' listeners ([`forwards`]) and the control socket's thread ([`control`]).

mod control;
mod forwards;
mod plane;
mod wires;

use crate::SwitchConfig;
use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::path::PathBuf;

/// A switch that cannot start or go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The control socket.
    #[error("cannot listen on the control socket {path}")]
    Control {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A wildcard would take frames from any network this host is on.
    #[error("the tunnel endpoint {0} is a wildcard; name this host's address")]
    Wildcard(SocketAddr),
    /// The tunnel endpoint.
    #[error("cannot bind the tunnel endpoint {vtep}")]
    Tunnel {
        /// Address and port.
        vtep: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The event loop.
    #[error("the switch's event loop cannot {act}")]
    Loop {
        /// What it tried.
        act: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl Error {
    fn event_loop(act: &'static str) -> impl Fn(rustix::io::Errno) -> Error {
        move |errno| Error::Loop { act, source: errno.into() }
    }
}

/// A switch whose sockets are bound; [`Switch::run`] starts it.
pub struct Switch {
    control: control::ControlSocket,
    plane: plane::Plane,
    vtep: SocketAddr,
}

impl Switch {
    /// Binds the control socket and the tunnel endpoint.
    pub fn bind(config: &SwitchConfig) -> Result<Switch, Error> {
        if config.vtep.ip().is_unspecified() {
            return Err(Error::Wildcard(config.vtep));
        }
        let tunnel = |source| Error::Tunnel { vtep: config.vtep, source };
        let udp = UdpSocket::bind(config.vtep).map_err(tunnel)?;
        udp.set_nonblocking(true).map_err(tunnel)?;
        let vtep = udp.local_addr().map_err(tunnel)?;
        let instance =
            mint_instance().map_err(|source| Error::Loop { act: "mint an instance", source })?;
        let (plane, commands) = plane::Plane::new(udp, vtep, &instance)?;
        let control = control::ControlSocket::bind(&config.control, commands)
            .map_err(|source| Error::Control { path: config.control.clone(), source })?;
        tracing::info!(%vtep, instance, control = %config.control.display(), "switch is ready");
        Ok(Switch { control, plane, vtep })
    }

    /// Address and port of the tunnel endpoint as bound.
    pub fn vtep(&self) -> SocketAddr {
        self.vtep
    }

    /// Moves frames until something breaks that the switch cannot live without.
    pub fn run(self) -> Result<(), Error> {
        let Switch { control, plane, .. } = self;
        raise_descriptor_limit();
        std::thread::Builder::new()
            .name("control".to_owned())
            .spawn(move || control.serve())
            .map_err(|source| Error::Loop { act: "start the control thread", source })?;
        plane.run()
    }
}

/// Each guest takes three descriptors and each forwarded connection one; the usual soft limit of 1024
/// is below what the switch's own limits allow.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }) {
        tracing::warn!(%error, "the limit of open descriptors stays as it is");
    }
}

/// Tells this run of the switch from every other.
fn mint_instance() -> io::Result<String> {
    use std::io::Read;
    let mut bytes = [0; 16];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}
