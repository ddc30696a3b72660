//! Dicts, ints, attributes: the few objects that are read besides frames.
//!
//! References: `Objects/dictobject.c`, `Include/cpython/longintrepr.h`, `Objects/object.c` of each version. Every read is
//! bounded; objects of a running process may be torn, which shows as an error or a missing item.

use super::layout::{InstanceDict, Layout};
use super::text::{ObjectError, read_str, shape, word};
use crate::addr::RemoteAddr;
use crate::memory::RemoteMemory;

/// Entries of a dict that are looked at.
const MAX_ENTRIES: u64 = 1 << 20;
const TPFLAGS_INLINE_VALUES: u64 = 1 << 2;
const TPFLAGS_MANAGED_DICT: u64 = 1 << 4;

/// Objects of one process, read through its layout.
#[derive(Clone, Copy)]
pub struct Objects<'a> {
    /// The process.
    pub memory: &'a dyn RemoteMemory,
    /// Its layout.
    pub layout: &'a Layout,
}

impl<'a> Objects<'a> {
    /// Objects of `memory`.
    pub fn new(memory: &'a dyn RemoteMemory, layout: &'a Layout) -> Self {
        Self { memory, layout }
    }

    /// The type of `object`.
    pub fn type_of(&self, object: RemoteAddr) -> Result<RemoteAddr, ObjectError> {
        Ok(self.memory.read_ptr(object.offset(self.layout.pyobject.ob_type))?)
    }

    /// The name of the type of `object`.
    pub fn type_name(&self, object: RemoteAddr) -> Result<String, ObjectError> {
        let name = self.memory.read_ptr(self.type_of(object)?.offset(self.layout.type_object.tp_name))?;
        Ok(self.memory.read_c_string(name, 128)?)
    }

    /// The value of a non-negative `int` below 2^64.
    pub fn int(&self, object: RemoteAddr) -> Result<u64, ObjectError> {
        let long = &self.layout.long_object;
        let wrong = |what: String| ObjectError::Wrong { addr: object, expected: "a small int", what };
        // Up to 3.11 the signed number of digits; since 3.12 that number above 3 bits of which 2 give the sign.
        let (digits, negative) = match (long.ob_size, long.lv_tag) {
            (Some(at), _) => {
                let size = self.memory.read_u64(object.offset(at))? as i64;
                (size.unsigned_abs(), size < 0)
            }
            (None, Some(at)) => {
                let tag = self.memory.read_u64(object.offset(at))?;
                (tag >> 3, tag & 3 == 2)
            }
            (None, None) => return Err(wrong("no layout".into())),
        };
        if negative || digits > 3 {
            return Err(wrong(format!("{digits} digits, negative: {negative}")));
        }
        let bytes = self.memory.read_vec(object.offset(long.ob_digit), digits as usize * 4)?;
        let value = bytes.chunks_exact(4).rev().fold(0_u128, |n, digit| {
            n << 30 | u128::from(u32::from_le_bytes([digit[0], digit[1], digit[2], digit[3]]))
        });
        u64::try_from(value).map_err(|_| wrong("beyond 64 bits".into()))
    }

    /// The text of a `str`, cut after `max` characters.
    pub fn text(&self, object: RemoteAddr, max: usize) -> Result<String, ObjectError> {
        read_str(self.memory, self.layout, object, max)
    }

    /// Keys and values of a `dict`, in its order.
    pub fn dict_items(&self, dict: RemoteAddr) -> Result<Vec<(RemoteAddr, RemoteAddr)>, ObjectError> {
        let keys = self.memory.read_ptr(dict.offset(self.layout.dict_object.ma_keys))?;
        let values = self.memory.read_ptr(dict.offset(self.layout.dict_object.ma_values))?;
        let split = (!values.is_null()).then(|| values.offset(self.layout.first_value()));
        self.items_of(dict, keys, split)
    }

    /// Keys of `keys` with the values of `values`, or their own.
    fn items_of(
        &self,
        dict: RemoteAddr,
        keys: RemoteAddr,
        values: Option<RemoteAddr>,
    ) -> Result<Vec<(RemoteAddr, RemoteAddr)>, ObjectError> {
        let layout = &self.layout.dict_keys;
        let header = self.memory.read_vec(keys, layout.dk_indices as usize)?;
        let field = |at: Option<u64>, width| at.and_then(|at| word(&header, at, width));
        let wrong = |what: String| ObjectError::Wrong { addr: dict, expected: "a dict", what };
        let used = field(Some(layout.dk_nentries), 8).unwrap_or(0);
        let (index, stride) = match (field(layout.dk_size, 8), field(layout.dk_log2_index_bytes, 1)) {
            (Some(slots @ 1..=0xff), _) => (slots, 24),
            (Some(slots @ 0x100..=0xffff), _) => (slots * 2, 24),
            (Some(slots @ 0x1_0000..=0xffff_ffff), _) => (slots * 4, 24),
            (None, Some(log2 @ 0..=40)) => {
                (1 << log2, if field(layout.dk_kind, 1) == Some(0) { 24 } else { 16 })
            }
            (slots, log2) => return Err(wrong(format!("{slots:?} slots, index of 2^{log2:?} bytes"))),
        };
        if used > MAX_ENTRIES {
            return Err(wrong(format!("{used} entries")));
        }
        let entries =
            self.memory.read_vec(keys.offset(layout.dk_indices + index), (used * stride) as usize)?;
        let split = match values {
            Some(at) => Some(self.memory.read_vec(at, used as usize * 8)?),
            None => None,
        };
        let mut items = Vec::with_capacity(used as usize);
        for (i, entry) in entries.chunks_exact(stride as usize).enumerate() {
            let key = word(entry, stride - 16, 8).unwrap_or(0);
            let value = match &split {
                Some(values) => word(values, i as u64 * 8, 8),
                None => word(entry, stride - 8, 8),
            };
            if let (1.., Some(value @ 1..)) = (key, value) {
                items.push((RemoteAddr(key), RemoteAddr(value)));
            }
        }
        Ok(items)
    }

    /// The value under the `str` key `name`.
    pub fn dict_get(&self, dict: RemoteAddr, name: &str) -> Result<Option<RemoteAddr>, ObjectError> {
        Ok(self.find(&self.dict_items(dict)?, name))
    }

    fn find(&self, items: &[(RemoteAddr, RemoteAddr)], name: &str) -> Option<RemoteAddr> {
        let length = name.chars().count() as u64;
        let is_name = |key: RemoteAddr| {
            shape(self.memory, self.layout, key).is_ok_and(|s| s.length == length)
                && self.text(key, name.len()).is_ok_and(|text| text == name)
        };
        items.iter().find(|(key, _)| is_name(*key)).map(|(_, value)| *value)
    }

    /// Attribute `name` of an instance of an ordinary class, from its dict or inline values.
    pub fn attribute(&self, object: RemoteAddr, name: &str) -> Result<Option<RemoteAddr>, ObjectError> {
        let class = self.type_of(object)?;
        let flags = self.memory.read_u64(class.offset(self.layout.type_object.tp_flags))?;
        let kind = self.layout.meaning.instance_dict;
        if kind == InstanceDict::Dictoffset || flags & TPFLAGS_MANAGED_DICT == 0 {
            let offset = self.memory.read_u64(class.offset(self.layout.type_object.tp_dictoffset))? as i64;
            if offset <= 0 {
                return Ok(None);
            }
            return self.attribute_in(self.memory.read_ptr(object.offset(offset as u64))?, name);
        }
        let before = self.layout.meaning.managed_dict_before.unwrap_or(24);
        let dict = self.memory.read_ptr(object.back(before))?;
        let values = match kind {
            InstanceDict::Dictoffset => None,
            InstanceDict::ValuesPointer => {
                let values = self.memory.read_ptr(object.back(before + 8))?;
                (dict.is_null() && !values.is_null()).then_some(values)
            }
            InstanceDict::TaggedWord => (dict.0 & 1 != 0).then(|| dict.offset(1)),
            InstanceDict::InlineValues => {
                let values =
                    object.offset(self.memory.read_u64(class.offset(self.layout.type_object.tp_basicsize))?);
                // {capacity, size, embedded, valid} then the values: `struct _dictvalues`.
                let inline = dict.is_null() && flags & TPFLAGS_INLINE_VALUES != 0;
                (inline && self.memory.read_u8(values.offset(3))? != 0).then_some(values)
            }
        };
        let Some(values) = values else { return self.attribute_in(dict, name) };
        let keys = self.memory.read_ptr(class.offset(self.layout.heap_type_object.ht_cached_keys))?;
        if keys.is_null() {
            return Ok(None);
        }
        let first = values.offset(self.layout.first_value());
        Ok(self.find(&self.items_of(object, keys, Some(first))?, name))
    }

    fn attribute_in(&self, dict: RemoteAddr, name: &str) -> Result<Option<RemoteAddr>, ObjectError> {
        if dict.is_null() { Ok(None) } else { self.dict_get(dict, name) }
    }

    /// The dict of a module.
    pub fn module_dict(&self, module: RemoteAddr) -> Result<RemoteAddr, ObjectError> {
        Ok(self.memory.read_ptr(module.offset(self.layout.module_object.md_dict))?)
    }
}
