//! Packet headers (virtio 1.2, section 5.10.6).

/// Bytes of a header.
pub const HEADER_BYTES: usize = 44;
/// The host's context id.
pub const HOST_CID: u64 = 2;
/// The only type of socket here: a stream.
pub const STREAM: u16 = 1;
/// Most bytes of a packet's payload.
pub const PAYLOAD_BYTES_MAX: usize = 64 << 10;

/// What a packet asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Open a connection.
    Request,
    /// It is open.
    Response,
    /// It is gone, or never was.
    Reset,
    /// The sender won't send or won't receive any more.
    Shutdown,
    /// Payload.
    Data,
    /// How much the sender has room for.
    CreditUpdate,
    /// Asks for a credit update.
    CreditRequest,
}

/// [`Operation::Shutdown`]: the sender won't receive any more.
pub const SHUTDOWN_RECEIVE: u32 = 1;
/// [`Operation::Shutdown`]: the sender won't send any more.
pub const SHUTDOWN_SEND: u32 = 2;

impl Operation {
    const NUMBERS: [(u16, Operation); 7] = [
        (1, Operation::Request),
        (2, Operation::Response),
        (3, Operation::Reset),
        (4, Operation::Shutdown),
        (5, Operation::Data),
        (6, Operation::CreditUpdate),
        (7, Operation::CreditRequest),
    ];

    fn of(number: u16) -> Option<Operation> {
        Operation::NUMBERS.iter().find(|(other, _)| *other == number).map(|(_, it)| *it)
    }

    fn number(self) -> u16 {
        Operation::NUMBERS.iter().find(|(_, it)| *it == self).map_or(0, |(number, _)| *number)
    }
}

/// A header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Context id of the sender.
    pub from_cid: u64,
    /// Context id of the receiver.
    pub to_cid: u64,
    /// Port of the sender.
    pub from_port: u32,
    /// Port of the receiver.
    pub to_port: u32,
    /// Bytes of payload behind the header.
    pub len: u32,
    /// Type of socket.
    pub kind: u16,
    /// What is asked for; `None`: nothing known.
    pub operation: Option<Operation>,
    /// Flags of the operation.
    pub flags: u32,
    /// Bytes of the sender's receive buffer.
    pub buffer_bytes: u32,
    /// Bytes that the sender has taken out of it since the start, modulo 2^32.
    pub forwarded: u32,
}

impl Header {
    /// Reads a header; every value of it may be nonsense.
    pub fn parse(bytes: &[u8; HEADER_BYTES]) -> Header {
        let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let word = |at: usize| u32::from(half(at)) | u32::from(half(at + 2)) << 16;
        let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
        Header {
            from_cid: long(0),
            to_cid: long(8),
            from_port: word(16),
            to_port: word(20),
            len: word(24),
            kind: half(28),
            operation: Operation::of(half(30)),
            flags: word(32),
            buffer_bytes: word(36),
            forwarded: word(40),
        }
    }

    /// Its bytes.
    pub fn bytes(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, &self.from_cid.to_le_bytes());
        put(8, &self.to_cid.to_le_bytes());
        put(16, &self.from_port.to_le_bytes());
        put(20, &self.to_port.to_le_bytes());
        put(24, &self.len.to_le_bytes());
        put(28, &self.kind.to_le_bytes());
        put(30, &self.operation.map_or(0, Operation::number).to_le_bytes());
        put(32, &self.flags.to_le_bytes());
        put(36, &self.buffer_bytes.to_le_bytes());
        put(40, &self.forwarded.to_le_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_has_the_specifications_layout() {
        let bytes: [u8; HEADER_BYTES] = std::array::from_fn(|index| index as u8);
        let header = Header::parse(&bytes);
        assert_eq!(
            (header.from_cid, header.to_cid),
            (0x0706_0504_0302_0100, 0x0F0E_0D0C_0B0A_0908)
        );
        assert_eq!(
            (header.from_port, header.to_port, header.len),
            (0x1312_1110, 0x1716_1514, 0x1B1A_1918)
        );
        assert_eq!((header.kind, header.operation, header.flags), (0x1D1C, None, 0x2322_2120));
        assert_eq!((header.buffer_bytes, header.forwarded), (0x2726_2524, 0x2B2A_2928));
        for (number, operation) in Operation::NUMBERS {
            let header = Header { operation: Some(operation), ..header };
            assert_eq!(header.bytes()[30..32], number.to_le_bytes());
            assert_eq!(Header::parse(&header.bytes()), header);
        }
    }
}
