//! As much of gRPC over HTTP/2 (RFC 9113) as `etcdserverpb.KV/Put` takes: no header compression on
//! our side, answers judged by their frames. Less work than any full client, so that the load
//! generator is not what limits etcd.

use std::collections::{HashMap, VecDeque};

use anyhow::{Result, bail};
use bytes::{Buf, BytesMut};

use super::load::Wire;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;

const ACK: u8 = 1;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

const FRAME_HEAD_BYTES: usize = 9;
/// The connection's window before the server grows it.
const WINDOW_BYTES: i64 = 65_535;
/// What we allow the server to send at once: more than a round ever brings.
const RECEIVE_WINDOW_MORE: u32 = (1 << 31) - 1 - 65_535;
/// Keys that are written in turn.
const KEYS: u64 = 10_000;

/// A connection that puts values of one length.
pub(super) struct Puts {
    headers: Vec<u8>,
    value: Vec<u8>,
    number: u64,
    next_stream: u32,
    /// Writer of each open stream, and whether its answer has come.
    streams: HashMap<u32, (usize, bool)>,
    window: i64,
    /// Writers that wait for the window.
    blocked: VecDeque<usize>,
}

impl Puts {
    /// Puts of `value_bytes` each; `first` makes its keys differ from another connection's.
    pub(super) fn new(authority: &str, value_bytes: usize, first: u64) -> Puts {
        Puts {
            headers: headers(authority),
            value: vec![b'x'; value_bytes],
            number: first,
            next_stream: 1,
            streams: HashMap::new(),
            window: WINDOW_BYTES,
            blocked: VecDeque::new(),
        }
    }

    fn message(&mut self) -> Vec<u8> {
        self.number = self.number.wrapping_add(1);
        let key = format!("{:08}", self.number % KEYS);
        let mut put = Vec::with_capacity(self.value.len() + 32);
        field(&mut put, 1, key.as_bytes());
        field(&mut put, 2, &self.value);
        let mut message = vec![0];
        message.extend((put.len() as u32).to_be_bytes());
        message.extend(put);
        message
    }
}

/// HPACK (RFC 7541): the static table's entries, and literals that nobody has to remember.
fn headers(authority: &str) -> Vec<u8> {
    let mut block = vec![0x83, 0x86];
    let mut literal = |name: &[u8], value: &[u8]| {
        block.extend(name);
        block.push(value.len() as u8);
        block.extend(value);
    };
    literal(&[0x04], b"/etcdserverpb.KV/Put");
    literal(&[0x01], authority.as_bytes());
    literal(&[0x0f, 0x10], b"application/grpc");
    literal(b"\x00\x02te", b"trailers");
    block
}

/// A length-delimited field of a protocol buffer.
fn field(out: &mut Vec<u8>, number: u8, content: &[u8]) {
    out.push(number << 3 | 2);
    let mut length = content.len();
    while length >= 0x80 {
        out.push(length as u8 | 0x80);
        length >>= 7;
    }
    out.push(length as u8);
    out.extend(content);
}

fn frame(out: &mut Vec<u8>, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
    out.extend(&(payload.len() as u32).to_be_bytes()[1..]);
    out.extend([kind, flags]);
    out.extend(stream.to_be_bytes());
    out.extend(payload);
}

impl Wire for Puts {
    fn open(&mut self, out: &mut Vec<u8>) {
        out.extend(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
        frame(out, SETTINGS, 0, 0, &[]);
        frame(out, WINDOW_UPDATE, 0, 0, &RECEIVE_WINDOW_MORE.to_be_bytes());
    }

    fn request(&mut self, writer: usize, out: &mut Vec<u8>) {
        let message = self.message();
        if self.window < message.len() as i64 {
            self.blocked.push_back(writer);
            return;
        }
        self.window -= message.len() as i64;
        let stream = self.next_stream;
        self.next_stream += 2;
        self.streams.insert(stream, (writer, false));
        frame(out, HEADERS, END_HEADERS, stream, &self.headers);
        frame(out, DATA, END_STREAM, stream, &message);
    }

    fn take(
        &mut self,
        input: &mut BytesMut,
        out: &mut Vec<u8>,
        done: &mut Vec<usize>,
    ) -> Result<()> {
        while input.len() >= FRAME_HEAD_BYTES {
            let length = u32::from_be_bytes([0, input[0], input[1], input[2]]) as usize;
            if input.len() < FRAME_HEAD_BYTES + length {
                return Ok(());
            }
            let (kind, flags) = (input[3], input[4]);
            let stream =
                u32::from_be_bytes([input[5], input[6], input[7], input[8]]) & (u32::MAX >> 1);
            input.advance(FRAME_HEAD_BYTES);
            let payload = input.split_to(length);
            match kind {
                SETTINGS if flags & ACK == 0 => frame(out, SETTINGS, ACK, 0, &[]),
                PING if flags & ACK == 0 => frame(out, PING, ACK, 0, &payload),
                WINDOW_UPDATE if stream == 0 && length == 4 => {
                    self.window += i64::from((&payload[..]).get_u32());
                    for writer in std::mem::take(&mut self.blocked) {
                        self.request(writer, out);
                    }
                }
                DATA => {
                    if let Some((_, answered)) = self.streams.get_mut(&stream) {
                        *answered |= length > 0;
                    }
                }
                // A refusal has trailers and no message.
                HEADERS if flags & END_STREAM != 0 => match self.streams.remove(&stream) {
                    Some((writer, true)) => done.push(writer),
                    _ => bail!("etcd refused a put"),
                },
                RST_STREAM | GOAWAY => bail!("etcd ended the connection"),
                _ => {}
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_put_waits_for_the_window_and_ends_with_its_trailers() {
        let mut puts = Puts::new("a:1", 40_000, 0);
        let mut out = Vec::new();
        puts.request(0, &mut out);
        puts.request(1, &mut out);
        assert_eq!(puts.blocked, [1]);
        assert_eq!(puts.streams.len(), 1);

        let mut answer = Vec::new();
        frame(&mut answer, WINDOW_UPDATE, 0, 0, &40_100u32.to_be_bytes());
        frame(&mut answer, DATA, 0, 1, &[0; 5]);
        frame(&mut answer, HEADERS, END_STREAM | END_HEADERS, 1, &[]);
        let mut done = Vec::new();
        // A frame that comes in two pieces is taken once it is whole.
        let mut input = BytesMut::from(&answer[..20]);
        puts.take(&mut input, &mut out, &mut done).unwrap();
        assert!(done.is_empty() && puts.blocked.is_empty());
        input.extend_from_slice(&answer[20..]);
        puts.take(&mut input, &mut out, &mut done).unwrap();
        assert_eq!(done, [0]);
    }

    #[test]
    fn a_refusal_is_an_error() {
        let mut puts = Puts::new("a:1", 1, 0);
        puts.request(0, &mut Vec::new());
        let mut answer = Vec::new();
        frame(&mut answer, HEADERS, END_STREAM | END_HEADERS, 1, &[]);
        let mut input = BytesMut::from(&answer[..]);
        assert!(puts.take(&mut input, &mut Vec::new(), &mut Vec::new()).is_err());
    }
}
