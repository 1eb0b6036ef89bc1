//! Reading and writing of little-endian numbers with every bound checked.

use super::FormatError;

/// Reads fields from the front of a byte slice.
#[derive(Clone, Debug)]
pub struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    /// Reads from the start of `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    /// How many bytes are left.
    pub fn remaining(&self) -> usize {
        self.rest.len()
    }

    /// The next `len` bytes.
    pub fn bytes(&mut self, len: usize) -> Result<&'a [u8], FormatError> {
        let (head, rest) = self.rest.split_at_checked(len).ok_or_else(|| {
            FormatError::invalid(format!("{len} more bytes expected, {} left", self.rest.len()))
        })?;
        self.rest = rest;
        Ok(head)
    }

    /// The next `N` bytes as an array.
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], FormatError> {
        let bytes = self.bytes(N)?;
        bytes.try_into().map_err(|_| FormatError::invalid("short array"))
    }

    /// One byte.
    pub fn u8(&mut self) -> Result<u8, FormatError> {
        self.array::<1>().map(|[byte]| byte)
    }

    /// Four bytes.
    pub fn u32(&mut self) -> Result<u32, FormatError> {
        self.array().map(u32::from_le_bytes)
    }

    /// Eight bytes.
    pub fn u64(&mut self) -> Result<u64, FormatError> {
        self.array().map(u64::from_le_bytes)
    }

    /// A LEB128 number of at most 64 bits, in its shortest form.
    pub fn varint(&mut self) -> Result<u64, FormatError> {
        let mut value = 0_u64;
        for shift in (0..64).step_by(7) {
            let byte = self.u8()?;
            let bits = u64::from(byte & 0x7f);
            if bits << shift >> shift != bits || (byte == 0 && shift > 0) {
                return Err(FormatError::invalid("a number is too long"));
            }
            value |= bits << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(FormatError::invalid("a number is too long"))
    }

    /// A LEB128 number that must not exceed `max`.
    pub fn bounded(&mut self, what: &str, max: u64) -> Result<u64, FormatError> {
        let value = self.varint()?;
        if value > max {
            return Err(FormatError::invalid(format!("{what} is {value}, at most {max} expected")));
        }
        Ok(value)
    }

    /// A LEB128 count of items that take at least `item_bytes` each: never more than the remaining bytes can hold,
    /// so that a bad count can't cause a big allocation.
    pub fn count(&mut self, what: &str, item_bytes: usize) -> Result<usize, FormatError> {
        let max = self.remaining() / item_bytes.max(1);
        let count = self.bounded(what, max as u64)?;
        usize::try_from(count).map_err(|_| FormatError::invalid("count"))
    }

    /// A LEB128 number that fits 32 bits.
    pub fn varint32(&mut self, what: &str) -> Result<u32, FormatError> {
        let value = self.bounded(what, u64::from(u32::MAX))?;
        u32::try_from(value).map_err(|_| FormatError::invalid("number"))
    }

    /// Checks that nothing is left.
    pub fn finish(self) -> Result<(), FormatError> {
        if self.rest.is_empty() {
            return Ok(());
        }
        Err(FormatError::invalid(format!("{} bytes too many", self.rest.len())))
    }
}

/// Appends a LEB128 number.
pub fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    loop {
        let byte = (value & 0x7f) as u8;
        value >>= 7;
        if value == 0 {
            out.push(byte);
            return;
        }
        out.push(byte | 0x80);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn refuses_long_forms_and_overflow() {
        assert!(Reader::new(&[0x80, 0]).varint().is_err());
        assert!(Reader::new(&[0xff; 10]).varint().is_err());
        assert!(Reader::new(&[0x80; 20]).varint().is_err());
        assert!(Reader::new(&[0x80]).varint().is_err());
    }

    proptest! {
        #[test]
        fn varints_round_trip(value: u64, shift in 0_u32..64) {
            let value = value >> shift;
            let mut out = Vec::new();
            put_varint(&mut out, value);
            let mut reader = Reader::new(&out);
            prop_assert_eq!(reader.varint().unwrap(), value);
            reader.finish().unwrap();
        }
    }
}
