//! The protocol's bytes, both ways, without I/O. Whatever arrives is untrusted: nothing here
//! panics, and every length is checked before it is believed.

use crate::control::ErrorKind;
use std::fmt;

/// First 16 bytes of a server.
pub(crate) const GREETING: [u8; 16] = *b"NBDMAGICIHAVEOPT";
const OPTION_MAGIC: u64 = u64::from_be_bytes(*b"IHAVEOPT");
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;

/// Handshake flags of the server, and the client's own of the same meaning.
pub(crate) const FIXED_NEWSTYLE: u16 = 1 << 0;
/// No 124 zero bytes after an old-style answer.
pub(crate) const NO_ZEROES: u16 = 1 << 1;

/// Longest payload of a request or of a reply to it.
pub(crate) const PAYLOAD_BYTES_MAX: u32 = 32 << 20;
/// Longest data of an option.
pub(crate) const OPTION_BYTES_MAX: u32 = 8 << 10;
/// Longest name of an export (the protocol's own limit is 4096).
pub(crate) const NAME_BYTES_MAX: usize = 512;
/// Most kinds of information that one request may ask for.
const INFO_REQUESTS_MAX: usize = 64;

pub(crate) const REQUEST_BYTES: usize = 28;
pub(crate) const SIMPLE_REPLY_BYTES: usize = 16;
pub(crate) const OPTION_HEADER_BYTES: usize = 16;
pub(crate) const OPTION_REPLY_HEADER_BYTES: usize = 20;

/// `NBD_OPT_*`.
pub(crate) mod option {
    pub(crate) const EXPORT_NAME: u32 = 1;
    pub(crate) const ABORT: u32 = 2;
    pub(crate) const LIST: u32 = 3;
    pub(crate) const STARTTLS: u32 = 5;
    pub(crate) const INFO: u32 = 6;
    pub(crate) const GO: u32 = 7;
}

/// `NBD_REP_*`.
pub(crate) mod reply {
    pub(crate) const ACK: u32 = 1;
    pub(crate) const SERVER: u32 = 2;
    pub(crate) const INFO: u32 = 3;
    pub(crate) const ERR_UNSUP: u32 = (1 << 31) | 1;
    pub(crate) const ERR_POLICY: u32 = (1 << 31) | 2;
    pub(crate) const ERR_INVALID: u32 = (1 << 31) | 3;
    pub(crate) const ERR_TLS_REQD: u32 = (1 << 31) | 5;
    pub(crate) const ERR_UNKNOWN: u32 = (1 << 31) | 6;
    pub(crate) const ERR_TOO_BIG: u32 = (1 << 31) | 9;
}

/// `NBD_INFO_*`.
pub(crate) mod info {
    pub(crate) const EXPORT: u16 = 0;
    pub(crate) const DESCRIPTION: u16 = 2;
    pub(crate) const BLOCK_SIZE: u16 = 3;
}

/// `NBD_FLAG_*` of an export.
pub(crate) mod export_flag {
    pub(crate) const HAS_FLAGS: u16 = 1 << 0;
    pub(crate) const READ_ONLY: u16 = 1 << 1;
    pub(crate) const SEND_FLUSH: u16 = 1 << 2;
    pub(crate) const SEND_FUA: u16 = 1 << 3;
    pub(crate) const SEND_TRIM: u16 = 1 << 5;
    pub(crate) const SEND_WRITE_ZEROES: u16 = 1 << 6;
}

/// `NBD_CMD_FLAG_*`.
pub(crate) mod command_flag {
    pub(crate) const FUA: u16 = 1 << 0;
    pub(crate) const NO_HOLE: u16 = 1 << 1;
}

/// What a client can ask of an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Command {
    Read,
    Write,
    Disconnect,
    Flush,
    Trim,
    WriteZeroes,
}

/// The error of a request, by its number on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RequestError {
    NotPermitted = 1,
    Io = 5,
    Invalid = 22,
    NoSpace = 28,
}

/// A request's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) flags: u16,
    /// `None`: a command that this program doesn't know.
    pub(crate) command: Option<Command>,
    pub(crate) cookie: u64,
    pub(crate) offset: u64,
    pub(crate) length: u32,
}

/// Bytes that are not this protocol: the connection ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Malformed {
    #[error("{what} starts with a wrong magic number")]
    Magic { what: &'static str },
    #[error("{what} has {length} bytes, over the limit")]
    TooLong { what: &'static str, length: u32 },
    #[error("{what} is shorter or longer than its fields")]
    Truncated { what: &'static str },
}

/// Cuts big-endian fields off the front of some bytes.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (field, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*field)
    }

    fn bytes(&mut self, length: usize) -> Option<&'a [u8]> {
        let (field, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(field)
    }

    fn u16(&mut self) -> Option<u16> {
        self.take().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_be_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_be_bytes)
    }
}

impl Request {
    pub(crate) fn parse(bytes: &[u8; REQUEST_BYTES]) -> Result<Self, Malformed> {
        const WHAT: &str = "a request";
        let mut fields = Fields(bytes);
        let truncated = Malformed::Truncated { what: WHAT };
        if fields.u32() != Some(REQUEST_MAGIC) {
            return Err(Malformed::Magic { what: WHAT });
        }
        let flags = fields.u16().ok_or(truncated)?;
        let command = Command::from_number(fields.u16().ok_or(truncated)?);
        let request = Self {
            flags,
            command,
            cookie: fields.u64().ok_or(truncated)?,
            offset: fields.u64().ok_or(truncated)?,
            length: fields.u32().ok_or(truncated)?,
        };
        // The payload of a longer write could only be thrown away.
        if request.command == Some(Command::Write) && request.length > PAYLOAD_BYTES_MAX {
            return Err(Malformed::TooLong { what: "a write", length: request.length });
        }
        Ok(request)
    }

    pub(crate) fn encode(&self, command: Command) -> [u8; REQUEST_BYTES] {
        let mut bytes = [0; REQUEST_BYTES];
        bytes[0..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        bytes[4..6].copy_from_slice(&self.flags.to_be_bytes());
        bytes[6..8].copy_from_slice(&command.number().to_be_bytes());
        bytes[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        bytes[16..24].copy_from_slice(&self.offset.to_be_bytes());
        bytes[24..28].copy_from_slice(&self.length.to_be_bytes());
        bytes
    }

    /// Bytes that follow this header.
    pub(crate) fn payload_bytes(&self) -> usize {
        if self.command == Some(Command::Write) { self.length as usize } else { 0 }
    }

    /// The command, where an export of that size and kind can do it.
    pub(crate) fn check(&self, size_bytes: u64, read_only: bool) -> Result<Command, RequestError> {
        let command = self.command.ok_or(RequestError::Invalid)?;
        let writes = matches!(command, Command::Write | Command::Trim | Command::WriteZeroes);
        if writes && read_only {
            return Err(RequestError::NotPermitted);
        }
        if command == Command::Read && self.length > PAYLOAD_BYTES_MAX {
            return Err(RequestError::Invalid);
        }
        let allowed = match command {
            Command::WriteZeroes => command_flag::FUA | command_flag::NO_HOLE,
            _ => command_flag::FUA,
        };
        if self.flags & !allowed != 0 {
            return Err(RequestError::Invalid);
        }
        if command == Command::Flush {
            return Ok(command);
        }
        match self.offset.checked_add(u64::from(self.length)) {
            Some(end) if end <= size_bytes => Ok(command),
            _ if writes => Err(RequestError::NoSpace),
            _ => Err(RequestError::Invalid),
        }
    }
}

impl Command {
    fn from_number(number: u16) -> Option<Self> {
        Some(match number {
            0 => Self::Read,
            1 => Self::Write,
            2 => Self::Disconnect,
            3 => Self::Flush,
            4 => Self::Trim,
            6 => Self::WriteZeroes,
            _ => return None,
        })
    }

    fn number(self) -> u16 {
        match self {
            Self::Read => 0,
            Self::Write => 1,
            Self::Disconnect => 2,
            Self::Flush => 3,
            Self::Trim => 4,
            Self::WriteZeroes => 6,
        }
    }
}

/// The header of a reply to a request; what was read follows it.
pub(crate) fn simple_reply(cookie: u64, error: Option<RequestError>) -> [u8; SIMPLE_REPLY_BYTES] {
    let mut bytes = [0; SIMPLE_REPLY_BYTES];
    bytes[0..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
    bytes[4..8].copy_from_slice(&error.map_or(0, |error| error as u32).to_be_bytes());
    bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
    bytes
}

/// Reads the header of a reply: its error (0 for none) and cookie.
pub(crate) fn parse_simple_reply(
    bytes: &[u8; SIMPLE_REPLY_BYTES],
) -> Result<(u32, u64), Malformed> {
    let mut fields = Fields(bytes);
    match (fields.u32(), fields.u32(), fields.u64()) {
        (Some(SIMPLE_REPLY_MAGIC), Some(error), Some(cookie)) => Ok((error, cookie)),
        _ => Err(Malformed::Magic { what: "a reply" }),
    }
}

/// Reads an option's header: its number and the length of its data.
pub(crate) fn parse_option(bytes: &[u8; OPTION_HEADER_BYTES]) -> Result<(u32, u32), Malformed> {
    let mut fields = Fields(bytes);
    match (fields.u64(), fields.u32(), fields.u32()) {
        (Some(OPTION_MAGIC), Some(_), Some(length)) if length > OPTION_BYTES_MAX => {
            Err(Malformed::TooLong { what: "an option", length })
        }
        (Some(OPTION_MAGIC), Some(option), Some(length)) => Ok((option, length)),
        _ => Err(Malformed::Magic { what: "an option" }),
    }
}

/// An option with its data.
pub(crate) fn option(option: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(OPTION_HEADER_BYTES + data.len());
    bytes.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
    bytes.extend_from_slice(&option.to_be_bytes());
    bytes.extend_from_slice(&(data.len() as u32).to_be_bytes());
    bytes.extend_from_slice(data);
    bytes
}

/// A reply to an option.
pub(crate) fn option_reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(OPTION_REPLY_HEADER_BYTES + data.len());
    bytes.extend_from_slice(&OPTION_REPLY_MAGIC.to_be_bytes());
    bytes.extend_from_slice(&option.to_be_bytes());
    bytes.extend_from_slice(&kind.to_be_bytes());
    bytes.extend_from_slice(&(data.len() as u32).to_be_bytes());
    bytes.extend_from_slice(data);
    bytes
}

/// Reads the header of a reply to an option: the option, the reply's kind, its data's length.
pub(crate) fn parse_option_reply(
    bytes: &[u8; OPTION_REPLY_HEADER_BYTES],
) -> Result<(u32, u32, u32), Malformed> {
    const WHAT: &str = "a reply to an option";
    let mut fields = Fields(bytes);
    match (fields.u64(), fields.u32(), fields.u32(), fields.u32()) {
        (Some(OPTION_REPLY_MAGIC), Some(_), Some(_), Some(length)) if length > OPTION_BYTES_MAX => {
            Err(Malformed::TooLong { what: WHAT, length })
        }
        (Some(OPTION_REPLY_MAGIC), Some(option), Some(kind), Some(length)) => {
            Ok((option, kind, length))
        }
        _ => Err(Malformed::Magic { what: WHAT }),
    }
}

/// The data of `INFO` and `GO`: an export's name and what is asked about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct InfoRequest {
    pub(crate) name: String,
    pub(crate) wanted: Vec<u16>,
}

impl InfoRequest {
    pub(crate) fn parse(data: &[u8]) -> Result<Self, Malformed> {
        Self::fields(data).ok_or(Malformed::Truncated { what: "INFO or GO" })
    }

    fn fields(data: &[u8]) -> Option<Self> {
        let mut fields = Fields(data);
        let length = fields.u32()? as usize;
        let name = parse_name(fields.bytes(length)?)?;
        let count = usize::from(fields.u16()?);
        if count > INFO_REQUESTS_MAX {
            return None;
        }
        let wanted = (0..count).map(|_| fields.u16()).collect::<Option<Vec<_>>>()?;
        fields.0.is_empty().then_some(Self { name, wanted })
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = (self.name.len() as u32).to_be_bytes().to_vec();
        bytes.extend_from_slice(self.name.as_bytes());
        bytes.extend_from_slice(&(self.wanted.len() as u16).to_be_bytes());
        for wanted in &self.wanted {
            bytes.extend_from_slice(&wanted.to_be_bytes());
        }
        bytes
    }
}

/// An export's name, as the data of `EXPORT_NAME` is.
pub(crate) fn parse_name(bytes: &[u8]) -> Option<String> {
    if bytes.len() > NAME_BYTES_MAX {
        return None;
    }
    std::str::from_utf8(bytes).ok().map(str::to_owned)
}

/// The data of a reply to `LIST` that names one export.
pub(crate) fn server_reply(name: &str) -> Vec<u8> {
    let mut bytes = (name.len() as u32).to_be_bytes().to_vec();
    bytes.extend_from_slice(name.as_bytes());
    bytes
}

/// The text of a refusal: the protocol has one number for all that the gate says, so ours comes
/// before the message.
pub(crate) fn refusal(kind: ErrorKind, message: &str) -> String {
    let kind = match kind {
        ErrorKind::Stale => "stale",
        ErrorKind::InUse => "in_use",
        ErrorKind::NotFound => "not_found",
        _ => "io",
    };
    let end = message.floor_char_boundary(OPTION_BYTES_MAX as usize / 2);
    format!("{kind}: {}", &message[..end])
}

/// Reads a text of [`refusal`].
pub(crate) fn parse_refusal(text: &str) -> Option<(ErrorKind, &str)> {
    let (kind, message) = text.split_once(": ")?;
    let kind = match kind {
        "stale" => ErrorKind::Stale,
        "in_use" => ErrorKind::InUse,
        "not_found" => ErrorKind::NotFound,
        "io" => ErrorKind::Io,
        _ => return None,
    };
    Some((kind, message))
}

/// What a client needs to know of an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ExportInfo {
    pub(crate) size_bytes: u64,
    pub(crate) flags: u16,
}

impl ExportInfo {
    pub(crate) fn new(size_bytes: u64, read_only: bool) -> Self {
        use export_flag::{
            HAS_FLAGS, READ_ONLY, SEND_FLUSH, SEND_FUA, SEND_TRIM, SEND_WRITE_ZEROES,
        };
        let flags = HAS_FLAGS | SEND_FLUSH | SEND_FUA;
        let flags = flags | if read_only { READ_ONLY } else { SEND_TRIM | SEND_WRITE_ZEROES };
        Self { size_bytes, flags }
    }

    /// As `EXPORT_NAME` answers it, and after its type as `INFO_EXPORT` does.
    pub(crate) fn encode(&self) -> [u8; 10] {
        let mut bytes = [0; 10];
        bytes[..8].copy_from_slice(&self.size_bytes.to_be_bytes());
        bytes[8..].copy_from_slice(&self.flags.to_be_bytes());
        bytes
    }

    /// Reads the data of an `INFO` reply; `None` where it is about something else.
    pub(crate) fn parse(data: &[u8]) -> Option<Self> {
        let mut fields = Fields(data);
        if fields.u16()? != info::EXPORT {
            return None;
        }
        Some(Self { size_bytes: fields.u64()?, flags: fields.u16()? })
    }
}

/// The data of an `INFO` reply with the limits on requests.
pub(crate) fn block_size_info() -> Vec<u8> {
    let mut bytes = info::BLOCK_SIZE.to_be_bytes().to_vec();
    for size_bytes in [1, 4096, PAYLOAD_BYTES_MAX] {
        bytes.extend_from_slice(&size_bytes.to_be_bytes());
    }
    bytes
}

/// What comes before the epoch in a description.
const EPOCH: &str = "trine storage, epoch ";

/// The data of an `INFO` reply with a description: in the protocol a text for people, of which
/// ours tells the epoch.
pub(crate) fn description_info(epoch: u64) -> Vec<u8> {
    [&info::DESCRIPTION.to_be_bytes()[..], format!("{EPOCH}{epoch}").as_bytes()].concat()
}

/// Reads the epoch from the data of an `INFO` reply; `None` where it is about something else.
pub(crate) fn parse_epoch(data: &[u8]) -> Option<u64> {
    let mut fields = Fields(data);
    if fields.u16()? != info::DESCRIPTION {
        return None;
    }
    std::str::from_utf8(fields.0).ok()?.strip_prefix(EPOCH)?.parse().ok()
}

/// The data of an `INFO` reply with an export's size and flags.
pub(crate) fn export_info(export: &ExportInfo) -> Vec<u8> {
    [&info::EXPORT.to_be_bytes()[..], &export.encode()].concat()
}

impl fmt::Display for RequestError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotPermitted => "not permitted",
            Self::Io => "input/output error",
            Self::Invalid => "invalid request",
            Self::NoSpace => "no space left",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn request(command: Command) -> Request {
        Request { flags: 0, command: Some(command), cookie: 7, offset: 4096, length: 512 }
    }

    #[test]
    fn a_request_reads_back_as_written() {
        for command in [
            Command::Read,
            Command::Write,
            Command::Disconnect,
            Command::Flush,
            Command::Trim,
            Command::WriteZeroes,
        ] {
            let request = request(command);
            assert_eq!(Request::parse(&request.encode(command)), Ok(request));
        }
    }

    #[test]
    fn a_request_past_the_end_or_against_the_export_is_refused() {
        let past = Request { offset: u64::MAX, ..request(Command::Read) };
        assert_eq!(past.check(8192, false), Err(RequestError::Invalid));
        let past = Request { offset: 8192 - 511, ..request(Command::Write) };
        assert_eq!(past.check(8192, false), Err(RequestError::NoSpace));
        assert_eq!(request(Command::Write).check(8192, true), Err(RequestError::NotPermitted));
        let long = Request { length: PAYLOAD_BYTES_MAX + 1, ..request(Command::Read) };
        assert_eq!(long.check(1 << 40, false), Err(RequestError::Invalid));
        let unknown = Request { command: None, ..request(Command::Read) };
        assert_eq!(unknown.check(8192, false), Err(RequestError::Invalid));
        assert_eq!(request(Command::Read).check(8192, true), Ok(Command::Read));
    }

    #[test]
    fn a_write_too_long_to_read_away_ends_the_connection() {
        let long = Request { length: PAYLOAD_BYTES_MAX + 1, ..request(Command::Write) };
        let parsed = Request::parse(&long.encode(Command::Write));
        assert!(matches!(parsed, Err(Malformed::TooLong { .. })));
    }

    #[test]
    fn an_epoch_reads_back_as_written_and_is_in_no_other_info() {
        assert_eq!(parse_epoch(&description_info(7)), Some(7));
        assert_eq!(parse_epoch(&export_info(&ExportInfo::new(512, false))), None);
        assert_eq!(parse_epoch(&[&[0, 2][..], b"a disk"].concat()), None);
        assert_eq!(ExportInfo::parse(&description_info(7)), None);
    }

    proptest! {
        #[test]
        fn whatever_arrives_is_read_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = InfoRequest::parse(&bytes);
            let _ = ExportInfo::parse(&bytes);
            let _ = parse_epoch(&bytes);
            let _ = parse_name(&bytes);
            if let Some(header) = bytes.first_chunk() {
                let _ = Request::parse(header);
            }
            if let Some(header) = bytes.first_chunk() {
                let _ = parse_simple_reply(header);
            }
            if let Some(header) = bytes.first_chunk() {
                let _ = parse_option(header);
            }
            if let Some(header) = bytes.first_chunk() {
                let _ = parse_option_reply(header);
            }
        }

        #[test]
        fn a_request_with_the_right_magic_is_checked_without_a_panic(
            rest in any::<[u8; REQUEST_BYTES - 4]>(), size_bytes in any::<u64>(), read_only in any::<bool>(),
        ) {
            let mut bytes = [0; REQUEST_BYTES];
            bytes[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
            bytes[4..].copy_from_slice(&rest);
            if let Ok(request) = Request::parse(&bytes)
                && let Ok(command) = request.check(size_bytes, read_only)
                && command != Command::Flush
            {
                prop_assert!(request.offset + u64::from(request.length) <= size_bytes);
            }
        }

        #[test]
        fn an_info_request_reads_back_as_written(name in "[a-z/0-9-]{0,80}", wanted in prop::collection::vec(any::<u16>(), 0..8)) {
            let request = InfoRequest { name, wanted };
            prop_assert_eq!(InfoRequest::parse(&request.encode()), Ok(request));
        }
    }
}
