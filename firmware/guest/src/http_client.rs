//! Fetching a URL, again and again until it answers or time is up.

use crate::network::{Generation, Network};
use crate::world::World;
use alloc::string::{String, ToString};
use inputs::http::{Response, ResponseReader, Url};
use runtime::clock::{self, Instant};
use smoltcp::iface::SocketHandle;
use smoltcp::socket::tcp::{Socket, SocketBuffer};

const RECEIVE_BYTES: usize = 16 << 10;
const TRANSMIT_BYTES: usize = 2 << 10;
/// One attempt takes no longer.
const ATTEMPT_MICROS_MAX: u64 = 3_000_000;
/// Between two attempts.
const PAUSE_MICROS: u64 = 100_000;

/// Fetches until `accept` takes an answer; the error is the last attempt's.
pub(crate) fn get<T>(
    world: &mut World,
    url: &Url,
    deadline: Instant,
    accept: impl Fn(&Response) -> Result<T, String>,
) -> Result<T, String> {
    loop {
        let attempt_deadline = deadline.min(clock::now().after_micros(ATTEMPT_MICROS_MAX));
        let reason =
            match fetch(world, url, attempt_deadline).and_then(|response| accept(&response)) {
                Ok(value) => return Ok(value),
                Err(reason) => reason,
            };
        let next = clock::now().after_micros(PAUSE_MICROS);
        if next >= deadline {
            return Err(reason);
        }
        world.wait_until(next);
    }
}

/// One attempt.
fn fetch(world: &mut World, url: &Url, deadline: Instant) -> Result<Response, String> {
    let network = world.network.as_mut().ok_or("no network device")?;
    let generation = network.generation();
    network.ask_for(url.address.into(), clock::now());
    let socket = connect(network, url)?;
    let result = transfer(world, generation, socket, url, deadline);
    if let Ok(network) = world.network_of(generation) {
        network.sockets.get_mut::<Socket>(socket).close();
        network.poll(clock::now());
        network.sockets.remove(socket);
    }
    result
}

fn connect(network: &mut Network, url: &Url) -> Result<SocketHandle, String> {
    let mut socket = Socket::new(
        SocketBuffer::new(alloc::vec![0; RECEIVE_BYTES]),
        SocketBuffer::new(alloc::vec![0; TRANSMIT_BYTES]),
    );
    socket.set_nagle_enabled(false);
    socket.set_ack_delay(None);
    let port = network.take_port();
    let server = core::net::SocketAddrV4::new(url.address.into(), url.port);
    socket
        .connect(network.interface.context(), server, port)
        .map_err(|error| alloc::format!("can't connect: {error}"))?;
    Ok(network.sockets.add(socket))
}

fn transfer(
    world: &mut World,
    generation: Generation,
    handle: SocketHandle,
    url: &Url,
    deadline: Instant,
) -> Result<Response, String> {
    let request = url.request();
    let mut unsent = request.as_bytes();
    let mut reader = ResponseReader::default();
    let mut connected = false;
    while clock::now() < deadline {
        let socket = world.network_of(generation)?.sockets.get_mut::<Socket>(handle);
        connected |= socket.may_send();
        if connected && !unsent.is_empty() && socket.can_send() {
            let sent = socket.send_slice(unsent).unwrap_or(0);
            unsent = &unsent[sent..];
        }
        while socket.can_recv() {
            let pushed = socket
                .recv(|bytes| (bytes.len(), reader.push(bytes)))
                .map_err(|error| error.to_string())?;
            if let Some(response) = pushed.map_err(|error| error.to_string())? {
                return Ok(response);
            }
        }
        if !socket.is_open() && !connected {
            return Err("connection refused".into());
        }
        if connected && !socket.may_recv() {
            return reader.finish().map_err(|error| error.to_string());
        }
        world.turn(Some(deadline));
    }
    Err(if connected { "no answer in time" } else { "no connection in time" }.into())
}
