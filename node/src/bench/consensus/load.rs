//! The load: closed-loop writers on a few connections, the same for every cluster. One task drives a
//! connection: it reads what has come, notes the times, and sends the next requests in one write, so
//! that the generator costs as little as it can.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use bytes::BytesMut;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Writers that share a connection.
const WRITERS_OF_A_CONNECTION: usize = 32;
/// How long the last answers of a round may take.
const DRAIN_WITHIN: Duration = Duration::from_secs(30);

/// What requests and answers look like on a connection.
pub(super) trait Wire: Send + 'static {
    /// What is sent first.
    fn open(&mut self, out: &mut Vec<u8>);

    /// Appends the next write of a writer.
    fn request(&mut self, writer: usize, out: &mut Vec<u8>);

    /// Takes whole messages off `input`; `done` gets the writers that were answered, `out` what the
    /// protocol itself has to answer.
    fn take(
        &mut self,
        input: &mut BytesMut,
        out: &mut Vec<u8>,
        done: &mut Vec<usize>,
    ) -> Result<()>;
}

/// What a round brought.
pub(super) struct Round {
    /// Latency of each write, milliseconds.
    pub(super) latencies_ms: Vec<f64>,
    /// Writes a second.
    pub(super) rate: f64,
}

/// `writers` writers for `length`, on connections made by `wire`.
pub(super) async fn round<W: Wire>(
    address: std::net::SocketAddr,
    writers: usize,
    length: Duration,
    wire: impl Fn() -> W,
) -> Result<Round> {
    let started = Instant::now();
    let until = started + length;
    let mut connections = tokio::task::JoinSet::new();
    let mut left = writers;
    while left > 0 {
        let share = left.min(WRITERS_OF_A_CONNECTION);
        left -= share;
        let drive = drive(address, wire(), share, until);
        connections.spawn(tokio::time::timeout(length + DRAIN_WITHIN, drive));
    }
    let mut latencies_ms = Vec::new();
    while let Some(connection) = connections.join_next().await {
        latencies_ms.extend(connection?.context("writes were not answered in time")??);
    }
    let rate = latencies_ms.len() as f64 / started.elapsed().as_secs_f64();
    Ok(Round { latencies_ms, rate })
}

async fn drive(
    address: std::net::SocketAddr,
    mut wire: impl Wire,
    writers: usize,
    until: Instant,
) -> Result<Vec<f64>> {
    let mut stream = TcpStream::connect(address).await.context("cannot connect to a member")?;
    stream.set_nodelay(true)?;
    let (mut input, mut out) = (BytesMut::with_capacity(64 << 10), Vec::new());
    wire.open(&mut out);
    let mut sent = vec![Instant::now(); writers];
    for writer in 0..writers {
        wire.request(writer, &mut out);
    }
    let (mut waiting, mut done, mut latencies) = (writers, Vec::new(), Vec::new());
    loop {
        stream.write_all(&out).await?;
        out.clear();
        if waiting == 0 {
            return Ok(latencies);
        }
        if stream.read_buf(&mut input).await? == 0 {
            bail!("a member closed its connection");
        }
        wire.take(&mut input, &mut out, &mut done)?;
        let now = Instant::now();
        for writer in done.drain(..) {
            latencies.push((now - sent[writer]).as_secs_f64() * 1e3);
            if now < until {
                sent[writer] = now;
                wire.request(writer, &mut out);
            } else {
                waiting -= 1;
            }
        }
    }
}
