//! The listeners of forwards: loopback ports of this host that lead into guests. One that cannot
//! listen is reported and tried again with the next program; the others go on.

use super::plane::Token;
use crate::compile::Tables;
use crate::control::ForwardFailure;
use crate::program::Forward;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::fd::OwnedFd;
use std::collections::BTreeMap;
use std::net::TcpListener;

/// A listener's number stands for one forward as it was programmed: a changed forward gets another.
pub(super) struct Forwards {
    listeners: BTreeMap<u32, (Forward, TcpListener)>,
    next: u32,
    failed: Vec<ForwardFailure>,
}

impl Forwards {
    pub(super) fn new() -> Forwards {
        Forwards { listeners: BTreeMap::new(), next: 0, failed: Vec::new() }
    }

    pub(super) fn failed(&self) -> &[ForwardFailure] {
        &self.failed
    }

    pub(super) fn get(&self, listener: u32) -> Option<&(Forward, TcpListener)> {
        self.listeners.get(&listener)
    }

    fn holds(&self, id: &str) -> bool {
        self.listeners.values().any(|(forward, _)| forward.id == id)
    }

    /// Stops what the tables no longer hold, then listens for what is new.
    pub(super) fn replace(&mut self, tables: &Tables, epoll: &OwnedFd) {
        self.listeners.retain(|_, (forward, _)| tables.forwards.contains(forward));
        self.failed.clear();
        for forward in &tables.forwards {
            if self.listeners.values().any(|(listening, _)| listening == forward) {
                continue;
            }
            match self.listen(forward, tables, epoll) {
                Ok(listener) => {
                    self.listeners.insert(self.next, (forward.clone(), listener));
                    self.next = self.next.wrapping_add(1);
                }
                Err(message) => {
                    tracing::warn!(forward_id = forward.id, message, "forward does not listen");
                    self.failed.push(ForwardFailure { id: forward.id.clone(), message });
                }
            }
        }
    }

    fn listen(
        &self,
        forward: &Forward,
        tables: &Tables,
        epoll: &OwnedFd,
    ) -> Result<TcpListener, String> {
        let address = forward.listen;
        if self.holds(&forward.id) {
            return Err(format!("forward {} is in the program twice", forward.id));
        }
        if !address.ip().is_loopback() {
            return Err(format!("{address} is not a loopback address of this host"));
        }
        let Some(port) = tables.port_by_id.get(&forward.port_id).map(|at| &tables.ports[*at])
        else {
            return Err(format!("port {} is not on this host", forward.port_id));
        };
        if !port.addresses.contains(&(*forward.internal.ip()).into())
            || forward.internal.port() == 0
        {
            return Err(format!("{} is not an address of port {}", forward.internal, port.id));
        }
        let listener = TcpListener::bind(address).and_then(|listener| {
            listener.set_nonblocking(true)?;
            epoll::add(
                epoll,
                &listener,
                EventData::new_u64(Token::Listener(self.next).pack()),
                EventFlags::IN,
            )?;
            Ok(listener)
        });
        listener.map_err(|error| format!("cannot listen on {address}: {error}"))
    }
}
